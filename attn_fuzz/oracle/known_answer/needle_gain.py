"""How far the scores of a needle's key stand out."""

from __future__ import annotations

import math
from typing import Final

from attn_fuzz.reference.case import Case

LOGIT_GAP: Final = 30.0
"""Scores that stand out by so much: what other keys add, e^-30 of it, is far below half a unit in the last place."""

CODE_CHANNELS: Final = 16
"""Channels that number the keys of a document, at most: 65536 of them."""


def needle_gain(case: Case, *, fp16: bool = False) -> float | None:
    """What a needle's query is in units of its key, or None where keys cannot be told apart or scores are capped.

    Args:
        case: a kernel case.
        fp16: a kernel keeps something in it, though the case's dtype be another.
    """
    if case.softcap or not 0 < max(case.packed_key_lengths) <= 1 << needle_code(case) or case.softmax_scale <= 0:
        return None
    # One differing channel changes a score by 2 c scale.
    gain = 2.0 ** math.ceil(math.log2(LOGIT_GAP / (2 * case.softmax_scale)))
    # A kernel may keep unscaled products in the dtype.
    return None if (fp16 or case.dtype == "fp16") and gain * case.head_dim > 30000 else gain


def needle_code(case: Case) -> int:
    """How many channels hold a key's number in its document, as signs."""
    return min(case.head_dim, CODE_CHANNELS)
