"""What kinds of values the fields of a case hold, and the words that some of them are one of."""

from __future__ import annotations

import math
from typing import Final

from attn_fuzz.reference.case_format import CaseError

LEVELS: Final = ("kernel", "layer")
DTYPES: Final = ("fp32", "bf16", "fp16")
NORMS: Final = ("none", "rms")
ROTARIES: Final = ("none", "default", "proportional")
VALUES: Final = ("gaussian", "large", "offset", "tiny", "ties")
WEIGHTS: Final = ("gaussian", "selection")
MEMORIES: Final = ("contiguous", "fused", "head_major", "sliced", "mixed", "misaligned", "strided", "broadcast")
FAR_MEMORIES: Final = ("far_rows", "far_heads", "far_base")
"""Kernel level only: elements lie beyond 2^31 of an allocation (reference/far_memory.py)."""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


_INTEGERS = (
    *("padding", "ranks", "tensor_ranks", "heads", "kv_heads", "head_dim", "hidden", "seed", "capacity"),
    "head_dim_v",
)
INTEGER_LISTS = ("lengths", "key_lengths", "cuts", "document_ids", "padding_ids", "window", "loose_max_seqlen", "gaps")
_BOOLEANS = ("causal", "shared_key_value", "lse_gradient")
_NUMBERS = ("scale", "softcap", "rotary_theta", "rotary_fraction")
_CHOICES = {
    "level": LEVELS,
    "query_norm": NORMS,
    "key_norm": NORMS,
    "value_norm": NORMS,
    "rotary": ROTARIES,
    "dtype": DTYPES,
    "values": VALUES,
    "weights": WEIGHTS,
    "memory": (*MEMORIES, *FAR_MEMORIES),
}


def check_types(case: object) -> None:
    """Raises CaseError unless every field of a case holds what it may, one sentence."""
    for name in _INTEGERS:
        if not _is_integer(value := getattr(case, name)) and not (name == "head_dim_v" and value is None):
            raise CaseError(f"{name} must be a whole number, not {value!r}")
    for name in INTEGER_LISTS:
        # Of thousands of documents, all at once.
        if (value := getattr(case, name)) is not None and set(map(type, value)) - {int}:
            raise CaseError(f"{name} must be a list of whole numbers, not {list(value)!r}")
    for name in _BOOLEANS:
        if not isinstance(value := getattr(case, name), bool):
            raise CaseError(f"{name} must be true or false, not {value!r}")
    for name in _NUMBERS:
        if not _is_number(value := getattr(case, name)) and not (name == "scale" and value is None):
            raise CaseError(f"{name} must be a finite number, not {value!r}")
    for name, choices in _CHOICES.items():
        if (value := getattr(case, name)) not in choices:
            raise CaseError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
