"""Limits that adapters declare because their backend is wrong or dies beyond them, as data, so that they are retested.

An adapter refuses such a case; ``unrestricted:BACKEND`` does not, and shows whether the limit is still needed
(``attn-fuzz retest``). Limits that a backend refuses by itself are none of these.
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


_SEEN: Final = "torch 2.11, flash-attn 2.8.3.post2 on an H100, 2026-11-23 (docs/oracle.md)"

LIMITS: Final[tuple[DeclaredLimit, ...]] = (
    *(
        DeclaredLimit(
            id=f"limit-{backend.replace('_', '-')}-misaligned",
            backend=f"unrestricted:{backend}",
            device="cuda",
            symptom="Crashed",
            about="q, k or v off 16-byte alignment ends in a misaligned-address fault that takes the context with it",
            reference=_SEEN,
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
        reference=_SEEN,
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
            minimal=Case.from_json(
                '{"level": "kernel", "lengths": [3], "key_lengths": [1], "head_dim": 8, "causal": false, '
                '"window": [0, 2], "dtype": "bf16"}'
            ),
        )
        for backend in ("flash", "torch_varlen")
    ),
)
"""Three of the table in docs/oracle.md, by backend; the others are conventions (the LSE of rows without keys, multiples
of 8 channels) or made up for by the adapter (the gradient's storage offset)."""
