"""Known issues: defects of backends that are not ours to mend, as data: where they are, and which cases meet them.

A case that an issue covers runs like any other, but for one that ends its process, which is refused outside a process
of its own. What such a case then looks like, and so what of it is counted as known, is for the oracle to say
(attn_fuzz/oracle/known_issues.py has an entry for each). The minimal case of every issue must keep failing on the
versions it was seen on (tests/test_known.py): an issue that is gone is taken out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from attn_fuzz.backends.known_where import (
    Calls,
    cublas_drops_the_rest,
    half_a_tile,
    long_sums,
    masked_whole_key_tiles,
    on_cuda,
    on_hopper,
    whole_key_tiles,
    window_cuts,
    with_cudnn_919,
)
from attn_fuzz.reference.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownIssue:
    """One defect of one backend."""

    id: str
    backends: tuple[str, ...]
    device: str
    about: str
    reference: str
    """Where it is reported, or on what it was seen."""
    present: Callable[[], bool]
    """Whether the versions here are those it was seen on."""
    covers: Callable[[Case, Calls], bool]
    minimal: Case
    crashes: bool = False
    """It takes the process or its CUDA context along: such cases run only in processes of their own, a few of them."""
    found_by: str = "not recorded"
    """As the ledger has it (attn_fuzz/findings/entry.py): ``campaign unaided``, ``probe``, ``published report tried``,
    ``person``. A probe is a question of ``backends --probe``, or of a check with inputs made for it, asked of the
    backend by itself."""
    script: str = ""
    """Of the published report, in ``upstream/scripts``; others are made of the minimal case where it is wrong
    (``attn-fuzz retest --scripts``)."""
    operators: tuple[str, ...] = ()
    """Beginnings of the names of torch's operators that have it: a user's kernel or layer that runs one has it, too."""

    def applies(self, backend: str, device: str) -> bool:
        """Whether the issue is to be expected of this backend here."""
        name = backend.removeprefix("legacy:").removeprefix("unrestricted:")
        return name in self.backends and device == self.device and self.present()


_TORCH: Final = "torch 2.11.0+cu130"


KNOWN: Final[tuple[KnownIssue, ...]] = (
    KnownIssue(
        id="cudnn-masked-backward-nan",
        backends=("sdpa_dense", "sdpa_dense_cudnn"),
        device="cuda",
        about="cuDNN's backward with an explicit mask gives NaN where exp(score - lse) of a masked or padding entry "
        "overflows float32: rows whose scores are all far below zero (-181; -90 is fine), or far below those of keys "
        "that they do not see. Only with a multiple of 64 keys; the memory-efficient and math kernels are right.",
        reference=f"pytorch#196678, cudnn-frontend#628; {_TORCH} with cuDNN 9.19 on an H100, 2026-11-23",
        found_by="probe",
        script="pytorch_196678.py",
        present=with_cudnn_919,
        covers=whole_key_tiles,
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [1], "key_lengths": [64], "head_dim": 8, "dtype": "bf16", "seed": 1}'
        ),
        operators=("aten::_scaled_dot_product_cudnn_attention",),
    ),
    KnownIssue(
        id="nested-cudnn-masked-nan",
        backends=("sdpa_nested",),
        device="cuda",
        about="The same of causal documents with past keys, for which sdpa_nested makes one call with a mask.",
        reference=f"pytorch#196678; {_TORCH} with cuDNN 9.19 on an H200, 2026-11-30 (results/axes/h200_8.json)",
        found_by="campaign unaided",
        script="pytorch_196678.py",
        present=with_cudnn_919,
        covers=masked_whole_key_tiles,
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [1, 3, 1], "key_lengths": [81, 3, 108], "document_ids": [0, 5, 6], '
            '"head_dim": 8, "dtype": "fp16", "values": "large", "seed": 1}'
        ),
    ),
    KnownIssue(
        id="sdpa-16-byte-rows",
        backends=(),
        device="cuda",
        about="torch's fused attention on CUDA reads rows in blocks of 16 bytes: where q, k or v does not begin at a "
        "multiple of them it ends in a misaligned address, or computes NaN without a word.",
        reference=f"pytorch#194818; {_TORCH} on an H200, 2026-11-28",
        found_by="campaign unaided",
        script="pytorch_194818.py",
        present=on_cuda,
        covers=lambda case, calls: case.memory == "misaligned",
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [1, 6, 1, 4, 1], "head_dim": 64, "scale": 0.125, "dtype": "bf16", '
            '"values": "ties", "seed": 4, "memory": "misaligned"}'
        ),
        crashes=True,
        operators=(
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_fused_attention_overrideable",
            "aten::_flash_attention_forward",
            "aten::_efficient_attention_forward",
        ),
    ),
    KnownIssue(
        id="efficient-window-backward",
        backends=("torch_efficient",),
        device="cuda",
        about="The backward of _efficient_attention_forward with window_size gives gradients as if of another mask: "
        "right forward, dQ, dK and dV wrong wherever the window hides a key.",
        reference=f"{_TORCH} on an H200, 2026-11-24; xformers leaves local masks out of this backward for NaN",
        found_by="probe",
        present=on_cuda,
        covers=window_cuts,
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [5], "head_dim": 8, "dtype": "bf16", "window": [1, -1]}'
        ),
    ),
    KnownIssue(
        id="torch-cudnn-row-stride",
        backends=("torch_cudnn",),
        device="cuda",
        about="_cudnn_attention_backward with prefix sums takes the rows of dQ, dK and dV to lie as far apart as those "
        "of q, k and v, and allocates them packed: gradients stay unwritten, or an illegal access ends it, where "
        "q, k or v is a slice of a wider buffer.",
        reference=f"{_TORCH} with cuDNN 9.19 on an H200, 2026-11-24; of the kind of pytorch#194818",
        found_by="probe",
        present=with_cudnn_919,
        covers=lambda case, calls: case.memory in ("fused", "sliced", "head_major"),
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [2, 3], "heads": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bf16", '
            '"memory": "fused"}'
        ),
        crashes=True,
    ),
    KnownIssue(
        id="nested-cudnn-gradient-stride",
        backends=("sdpa_nested_cudnn",),
        device="cuda",
        about="cuDNN's backward of jagged tensors takes the output's gradient to be packed: with rows that lie further "
        "apart, all gradients are wrong or unwritten.",
        reference=f"{_TORCH} with cuDNN 9.19 on an H200, 2026-11-24; padded grad_out is among pytorch#194818",
        found_by="probe",
        present=with_cudnn_919,
        covers=lambda case, calls: case.level == "kernel" and case.memory in ("fused", "sliced", "head_major"),
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [5, 33], "heads": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bf16", '
            '"memory": "fused"}'
        ),
        crashes=True,
    ),
    KnownIssue(
        id="cudnn-varlen-long-documents",
        backends=("torch_cudnn", "sdpa_nested_cudnn"),
        device="cuda",
        about="_cudnn_attention_backward with prefix sums takes head_dim for max_seqlen: rows of documents longer than "
        "head_dim get wrong or unwritten gradients, and what lies behind its scratch memory is written to.",
        reference=f"pytorch#186142; {_TORCH} with cuDNN 9.19 on an H200, 2026-11-24",
        found_by="campaign unaided",
        script="pytorch_186142.py",
        present=with_cudnn_919,
        covers=lambda case, calls: any(max(q, k) > case.head_dim for call in calls for q, k in call),
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [65], "heads": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bf16"}'
        ),
        crashes=True,
    ),
    KnownIssue(
        id="cudnn-frontend-row-stride",
        backends=("cudnn_frontend",),
        device="cuda",
        about="sdpa_torch's backward puts dQ, and for some lengths dK and dV, where the row stride of q, k and v says, "
        "although gradients are packed: wrong or unwritten when those are slices of a wider buffer, and whatever lies "
        "there is written over: with windows and 128 channels in fp16 the call ends in an illegal instruction.",
        reference=f"cudnn-frontend 1.32.0, cuDNN 9.19, {_TORCH} on an H200, 2026-11-24, and on an H100, 2026-11-25; of "
        "the kind of cudnn-frontend#516 and #540",
        found_by="probe",
        present=with_cudnn_919,
        covers=lambda case, calls: case.level == "kernel" and case.memory in ("fused", "sliced", "head_major"),
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [2, 3], "heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "bf16", '
            '"memory": "fused"}'
        ),
        crashes=True,
    ),
    KnownIssue(
        id="cudnn-frontend-no-keys",
        backends=("cudnn_frontend",),
        device="cuda",
        about="sdpa_torch leaves out and LSE of documents with queries and no keys unwritten.",
        reference=f"cudnn-frontend 1.32.0, cuDNN 9.19, {_TORCH} on an H200, 2026-11-24; not reported before as far "
        "as we know",
        found_by="probe",
        present=with_cudnn_919,
        covers=lambda case, calls: any(q > 0 and k == 0 for call in calls for q, k in call),
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [2, 3], "key_lengths": [0, 3], "heads": 4, "kv_heads": 2, "head_dim": 64, '
            '"dtype": "bf16"}'
        ),
    ),
    KnownIssue(
        id="cublas-k-tail",
        backends=("backup",),
        device="cuda",
        about="cuBLAS takes products of half precision apart along their sums, and for some lengths, no multiples "
        "of 16, leaves the last rows out: torch.bmm and torch.mm lose up to 12 of 33,160 rows, and dK and dV what the "
        "last queries of the call add.",
        reference=f"facebookexperimental/triton#2767; {_TORCH} on an H200, 2026-11-29: sums over 33,156, 33,160 and "
        "33,164 rows into 80 to 96 x 136 to 152, bf16 and fp16",
        found_by="campaign unaided",
        script="triton_2767.py",
        present=cublas_drops_the_rest,
        covers=long_sums,
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [4095, 14, 0, 12, 7, 15, 2], "key_lengths": [1, 12, 0, 14, 12, 32, 17], '
            '"document_ids": [40, 41, 42, 43, 44, 45, 46], "heads": 8, "head_dim": 144, "causal": false, '
            '"scale": 0.125, "dtype": "bf16", "values": "large", "seed": 58197}'
        ),
    ),
    KnownIssue(
        id="cublas-k-tail-short",
        backends=("flex_eager",),
        device="cuda",
        about="The same of sums over 2,561 rows, 2,689, 3,329, 6,145 or 6,146 into 8 x 8 to 16 x 8: the last row or "
        "two are left out of dK and dV, which its backward makes by such products.",
        reference=f"facebookexperimental/triton#2767; {_TORCH} on an H200, 2026-11-30: of 23 lengths from 2,049 to "
        "8,193 these five, torch.matmul, torch.bmm and torch.mm alike, bf16 and fp16",
        found_by="campaign unaided",
        script="triton_2767.py",
        present=cublas_drops_the_rest,
        covers=long_sums,
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [2689], "key_lengths": [8], "head_dim": 8, "dtype": "bf16"}'
        ),
    ),
    KnownIssue(
        id="flash4-half-padded-channels",
        backends=("flash4",),
        device="cuda",
        about="On Hopper the backward counts channels in 16, and what allocates its float32 accumulators and reads "
        "them back counts in 32: where that differs, up to a head_dim of 128, dQ is wrong from the 65th row of the "
        "first document on, and with grouped heads so are dK and dV.",
        reference=f"flash-attention#2896; flash-attn-4 4.0.0b36, {_TORCH} on an H200, 2026-11-30",
        found_by="campaign unaided",
        script="flash_attn_2896.py",
        present=on_hopper,
        covers=half_a_tile,
        minimal=Case.from_json('{"level": "kernel", "lengths": [66], "head_dim": 8, "dtype": "bf16"}'),
    ),
)


def issues_of(backend: str, device: str, case: Case, calls: Calls) -> tuple[KnownIssue, ...]:
    """Issues that a case on a backend may run into here."""
    return tuple(issue for issue in KNOWN if issue.applies(backend, device) and issue.covers(case, calls))


def issues_below(device: str, case: Case, calls: Calls) -> tuple[KnownIssue, ...]:
    """Issues of torch's own operators that a user's kernel or layer runs into here, if it is built on one of those."""
    return tuple(
        issue
        for issue in KNOWN
        if issue.operators and issue.device == device and issue.present() and issue.covers(case, calls)
    )


def built_on(issue: KnownIssue, operators: Sequence[str]) -> bool:
    """Whether one of these operators has the issue."""
    return any(name.startswith(issue.operators) for name in operators)


def crash_issue_of(backend: str, device: str, case: Case, calls: Calls) -> KnownIssue | None:
    """The crash-class issue that a case on a backend runs into here, if any."""
    return next((issue for issue in issues_of(backend, device, case, calls) if issue.crashes), None)
