"""What exact probes must allow a backend that declares formats narrower than the case's, or coarse exponentials."""

from __future__ import annotations

import math
from typing import Final

from attn_fuzz.oracle.known_answer.needle_gain import CODE_CHANNELS, needle_gain
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.narrow import LARGEST_ERROR, Narrow
from attn_fuzz.reference.profile import PARTIAL_SUM_KEYS, UNIT_ROUNDOFF, Profile

NEAR_WHOLE: Final = 0.25
"""From a whole number, of ``out * n``: correct kernels stay within 0.01 of it, a wrong key moves it by 1 or more."""

_LSE: Final = 1e-3
"""Of a log of a number of keys: float32, and fast logarithms of GPUs."""

_SPLIT: Final = 2.0**-18
"""Relative error of a float32 product in three TF32 ones; other keys' values differ at random."""

_LEAST_GAP: Final = 8.0
"""Scores that stand out by less than this, e^-8 for each of the nearest keys, are no needle."""


def in_fp16(case: Case, profile: Profile) -> bool:
    """Whether something of a case may be kept in float16, which numbers beyond 65504 overflow."""
    return "fp16" in (case.dtype, profile.products, profile.scores_dtype, profile.probabilities_dtype)


def weight_error(case: Case, profile: Profile) -> float:
    """The largest relative error of a row's weights, which the storage dtype's unit roundoff is part of."""
    narrow = Narrow.of(case.dtype, profile)
    return max(UNIT_ROUNDOFF[case.dtype], narrow.weights if narrow else 0.0)


def support_slack(case: Case, profile: Profile, score: float) -> float:
    """How far dV of a single row's keys may be from one over their number, relative to it.

    A rounding or three, and what float32 makes of exp(score - lse).
    """
    narrow = Narrow.of(case.dtype, profile)
    return 0.02 + 4 * 2.0**-23 * abs(score) + (2 * narrow.weights if narrow else 0.0)


def lse_slack(case: Case, score: float) -> float:
    """How far the LSE of equal scores may be from that score plus the log of their number.

    float32 around a score of this size, and around the fast logarithms and hyperbolic tangents of GPUs.
    """
    return _LSE + 2.0**-10 * abs(score) * bool(case.softcap) + 2.0**-20 * abs(score)


def stores_dq(case: Case, profile: Profile) -> bool:
    """Whether running sums of dQ are kept in the dtype. A dense call counts the keys of all documents."""
    partial = profile.stores_partial_sums and sum(case.packed_key_lengths) > PARTIAL_SUM_KEYS
    return partial or "dq" in profile.atomic_sums


def holds_whole_numbers(case: Case, profile: Profile) -> bool:
    """Whether whole-number gradients of a case, and weights that are powers of two, are exact as operands."""
    narrow = Narrow.of(case.dtype, profile)
    return narrow is None or not (narrow.exponential or (case.dtype == "fp16" and narrow.products == "bf16"))


def needle_slack(case: Case, profile: Profile) -> float:
    """How far, relative to the value that a row points at, the output may be from it; inf where there is no needle.

    The weight is 1 in every format. The value is an operand of a product; and scores of ``gain head_dim scale`` that
    are stored with a relative error u each may stand out by ``2 u gain head_dim scale`` less than they should, which
    lets the nearest keys in.
    """
    narrow = Narrow.of(case.dtype, profile)
    slack = _SPLIT if case.dtype == "fp32" else 0.0
    if in_fp16(case, profile) and needle_gain(case, fp16=True) is None:
        return math.inf
    if narrow is None:
        return slack
    found = narrow.exponential + (0.0 if narrow.holds_inputs else LARGEST_ERROR[narrow.products])
    if narrow.scores and (gain := needle_gain(case)) is not None:
        gap = 2 * gain * case.softmax_scale
        left = gap * (1 - LARGEST_ERROR[narrow.scores] * case.head_dim)
        if left < _LEAST_GAP:
            return math.inf
        found += 4 * CODE_CHANNELS * math.exp(-left)
    # What is off before it is stored may be stored a unit further on, in either direction.
    stored = 2 * UNIT_ROUNDOFF[case.dtype] if found > UNIT_ROUNDOFF[case.dtype] / 8 else 0.0
    return slack + found + stored if stored else slack
