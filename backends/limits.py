"""Limits that adapters declare because their backend is wrong or dies beyond them, as data, so that they are retested.

An adapter refuses such a case, or has it asked otherwise (``finite_rest``); ``unrestricted:BACKEND`` does not, and
shows whether the limit is still needed (``attn-fuzz retest``). Limits that a backend refuses by itself are none of
these.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from attn_fuzz.reference.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeclaredLimit:
    """One limit of one backend."""

    id: str
    backend: str
    device: str
    symptom: str
    """What a case beyond it shows."""
    about: str
    reference: str
    """On what it was seen."""
    minimal: Case
    found_by: str = "not recorded"
    """As of known issues (``backends.known``)."""
    script: str = ""
    """Likewise."""


_SEEN: Final = "torch 2.11, flash-attn 2.8.3.post2 on an H100, 2026-11-23 (docs/oracle.md)"
_RAN: Final = "campaign unaided"
"""That these were found by running cases docs/oracle.md and docs/backends.md say; there were no probes before
2026-11-24."""

_NO_KEYS: Final = {
    "flash": "torch 2.11, flash-attn 2.8.3.post2 on an H100, 2026-11-25 (docs/backends.md)",
    "torch_flash": "torch 2.11 on an H200, 2026-11-24 (results/h200_campaign_1.json)",
    "torch_varlen": "torch 2.11 on an H200, 2026-11-24 (docs/backends.md)",
}
"""On what each was seen."""

_ON_HOPPER: Final = (
    "torch 2.11.0+cu130 on an H200, 2026-11-24; of the kind of cudnn-frontend#624, #646 and SageAttention#377"
)

LIMITS: Final[tuple[DeclaredLimit, ...]] = (
    *(
        DeclaredLimit(
            id=f"limit-{backend.replace('_', '-')}-misaligned",
            backend=f"unrestricted:{backend}",
            device="cuda",
            symptom="Crashed",
            about="q, k or v off 16-byte alignment ends in a misaligned-address fault that takes the context with it",
            reference=_SEEN,
            found_by=_RAN,
            script="pytorch_194818.py" if backend == "torch_varlen" else "",
            minimal=Case.from_json(
                '{"level": "kernel", "lengths": [1, 6, 1, 4, 1], "head_dim": 64, "dtype": "bf16", '
                '"memory": "misaligned"}'
            ),
        )
        for backend in ("flash", "torch_varlen", "sdpa_dense", "sdpa_nested")
    ),
    DeclaredLimit(
        id="limit-flash-decoding-batch",
        backend="unrestricted:flash",
        device="cuda",
        symptom="Crashed",
        about="grouped heads, a longest document of one query and an empty document beside it are taken for a decoding "
        "batch, which raises about a shape",
        reference=f"{_SEEN}; tests/regressions/single_query_beside_empty_document.json",
        found_by=_RAN,
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [0, 1], "heads": 2, "head_dim": 8, "causal": false, "dtype": "bf16"}'
        ),
    ),
    *(
        DeclaredLimit(
            id=f"limit-{backend.replace('_', '-')}-open-window",
            backend=f"unrestricted:{backend}",
            device="cuda",
            symptom="WrongOutput",
            about="a window with a left bound whose right side is open or at least max_seqlen_k, over a document with "
            "more queries than keys, is closed at max_seqlen_k: early rows see no key although they may",
            reference=_SEEN,
            found_by=_RAN,
            minimal=Case.from_json(
                '{"level": "kernel", "lengths": [3], "key_lengths": [1], "head_dim": 8, "causal": false, '
                '"window": [0, 2], "dtype": "bf16"}'
            ),
        )
        for backend in ("flash", "torch_varlen")
    ),
    *(
        DeclaredLimit(
            id=f"limit-{backend.replace('_', '-')}-no-keys",
            backend=f"unrestricted:{backend}",
            device="cuda",
            symptom="Crashed",
            about='a call without a single key raises "invalid argument", which its launch fails with',
            reference=seen,
            found_by=_RAN,
            minimal=Case.from_json(
                '{"level": "kernel", "lengths": [1], "key_lengths": [0], "head_dim": 8, "dtype": "bf16"}'
            ),
        )
        for backend, seen in _NO_KEYS.items()
    ),
    DeclaredLimit(
        id="limit-torch-cudnn-grouped",
        backend="unrestricted:torch_cudnn",
        device="cuda",
        symptom="PoisonLeaked",
        about="grouped heads leave the gradients of a single token unwritten",
        reference="torch 2.11, cuDNN 9.19 on an H200, 2026-11-24 (docs/backends.md)",
        found_by=_RAN,
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [1], "heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "bf16"}'
        ),
    ),
    DeclaredLimit(
        id="limit-flash3-documents",
        backend="unrestricted:flash3",
        device="cuda",
        symptom="PoisonLeaked",
        about="of 65,536 documents and more the backward leaves all gradients unwritten and says nothing: CUDA takes "
        "no such grid, and that a launch fails is not looked at",
        reference="flash-attn-3 built for torch 2.11.0+cu130 on an H200, 2026-11-29; mended in a descendant of it "
        "(SandAI-org/MagiAttention#40)",
        found_by=_RAN,
        minimal=Case(level="kernel", lengths=(1,) * 65536, head_dim=8, dtype="bf16"),
    ),
    DeclaredLimit(
        id="limit-torch-efficient-far-rows",
        backend="unrestricted:torch_efficient",
        device="cuda",
        symptom="Crashed",
        about="keys of one document that lie more than 2^31 elements behind its first one are read from before it, an "
        "illegal access where nothing lies there: offsets are of 32 bits; queries are found, and heads so far apart "
        "are refused by the operator",
        reference="torch 2.11.0+cu130 on an H200, 2026-12-01",
        found_by=_RAN,
        script="pytorch_efficient_far_keys.py",
        minimal=Case(level="kernel", lengths=(300,), heads=2, kv_heads=2, head_dim=64, dtype="bf16", memory="far_rows"),
    ),
    *(
        DeclaredLimit(
            id=f"limit-{backend.replace('_', '-')}-mask",
            backend=f"unrestricted:{backend}",
            device="cuda",
            symptom="WrongKeys",
            about="of a mask of more than 2^32 entries the memory-efficient kernel reads the wrong rows",
            reference="pytorch#187227; torch 2.11.0+cu130 on an H200, 2026-11-29",
            found_by=_RAN,
            script="pytorch_187227.py",
            minimal=Case(level="kernel", lengths=(4096,) * 17, head_dim=8),
        )
        for backend in ("sdpa_dense", "sdpa_dense_efficient")
    ),
    *(
        DeclaredLimit(
            id=f"limit-{backend.replace('_', '-')}-lse-gradient",
            backend=f"unrestricted:{backend}",
            device="cuda",
            symptom="WrongGradQ",
            about="the LSE that it returns is not marked as without a gradient, and one given to it is dropped without "
            "a word: a loss of the LSE alone has gradients of 0",
            reference=f"{report} on an H200, 2026-11-30",
            found_by="published report tried",
            script=script,
            minimal=Case(level="kernel", lengths=(1,), head_dim=8, dtype="bf16", lse_gradient=True),
        )
        for backend, script, report in (
            ("flash", "flash_attn_1817.py", "flash-attention#1817; flash-attn 2.8.3.post2"),
            (
                "torch_varlen",
                "pytorch_varlen_lse_gradient.py",
                "flash-attention#1817, of torch not reported before as far as we know; torch 2.11.0+cu130",
            ),
        )
    ),
    *(
        DeclaredLimit(
            id=f"limit-{backend}-nan-{where}",
            backend=f"unrestricted:{backend}",
            device="cuda",
            symptom="PoisonLeaked",
            about="K and V come in whole tiles, and what a tile holds beside its document is multiplied by 0: NaN in "
            f"rows {where} documents comes out, forward and backward; numbers do not",
            reference=reference,
            found_by="probe",
            minimal=Case(
                level="kernel",
                lengths=(16,),
                heads=4,
                kv_heads=2,
                head_dim=64,
                dtype="bf16",
                **rows,
            ),
        )
        for backend, reference in (
            ("flash3", f"flash-attn-3 built for {_ON_HOPPER}"),
            ("flash4", f"flash-attn-4 4.0.0b36, {_ON_HOPPER}"),
        )
        for where, rows in (("behind", {"capacity": 1}), ("between", {"gaps": (0, 3)}))
    ),
    DeclaredLimit(
        id="limit-flash4-80-row-tiles",
        backend="unrestricted:flash4",
        device="cuda",
        symptom="Crashed",
        about="with neither a causal mask nor a window the backward on Hopper has tiles of 80 rows above 96 channels, "
        "and of 104 and 112, which it rounds to 112, it is not compiled: failed to partition",
        reference="flash-attn-4 4.0.0b36, torch 2.11.0+cu130 on an H200, 2026-11-30; of the cause of "
        "flash-attention#2896",
        found_by="published report tried",
        minimal=Case(level="kernel", lengths=(1,), head_dim=104, causal=False, dtype="bf16"),
    ),
    *(
        DeclaredLimit(
            id=f"limit-flash4-value-{name}",
            backend="unrestricted:flash4",
            device="cuda",
            symptom="Crashed",
            about=about,
            reference="not reported before as far as we know; flash-attn-4 4.0.0b36, torch 2.11.0+cu130 on an H200, "
            "2026-11-30 (results/outside/h200_flash4_values.txt)",
            found_by=found_by,
            script="flash_attn_4_value_tiles.py" if name == "tiles" else "",
            minimal=Case(level="kernel", lengths=lengths, head_dim=dims[0], head_dim_v=dims[1], dtype="bf16"),
        )
        for name, found_by, lengths, dims, about in (
            (
                "tiles",
                _RAN,
                (1,),
                (24, 40),
                "up to 128 channels of a key the backward on Hopper lays the output's gradient out in shared memory "
                "by the key's channels, not by the value's: where the swizzle of those does not go into these, it is "
                "not compiled (MLIRError: Operation creation failed), as of 64 beside 32",
            ),
            (
                "memory",
                "probe",
                (3, 2),
                (64, 128),
                "for values of many channels the backward on Hopper asks for more shared memory than there is "
                "(248,832 of 232,448 bytes), and its launch fails",
            ),
            (
                "halves",
                "probe",
                (3, 2),
                (16, 40),
                "where channels of keys or of values fill half of the last 32, as both do here, the backward on "
                "Hopper ends in an illegal access; not tried further",
            ),
        )
    ),
    DeclaredLimit(
        id="limit-sdpa-nested-math-padded",
        backend="unrestricted:sdpa_nested_math",
        device="cuda",
        symptom="Crashed",
        about="under autograd products of nested tensors are made of padded ones, and of more than 2^31 scores then, "
        "padding counted, the last documents' are read from elsewhere: wrong out, dK and dV, or an illegal access",
        reference="of the kind of pytorch#135930; torch 2.11.0+cu130 on an H200, 2026-11-30",
        found_by=_RAN,
        script="pytorch_nested_padding.py",
        minimal=Case(
            level="kernel",
            lengths=(4096, 1, 1),
            key_lengths=(1, 4096, 1),
            heads=64,
            kv_heads=64,
            head_dim=8,
            causal=False,
            dtype="fp16",
        ),
    ),
)
"""Of docs/oracle.md three of the table, and of docs/backends.md what is refused since campaigns found it wrong, each by
backend. The others there are conventions (the LSE of rows without keys), refused by the backend itself (head dimensions
that are no multiples of 8, calls of one query and one key), or made up for by the adapter (the gradient's storage
offset)."""
