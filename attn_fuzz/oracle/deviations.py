"""How far results are from the answer, in standard deviations of their budget, and where the verdict is."""

from __future__ import annotations

import math
from typing import Final

import torch

from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import ROUNDING_SECOND_MOMENT

LIMIT: Final = 10.0
"""Standard deviations. The largest error of correct tensor-core kernels over 4e9 elements was 8.6 (docs/oracle.md)."""


STRUCTURED: Final = ("ties",)
"""Value modes of few distinct numbers."""

_RIGOROUS: Final = 1 / ROUNDING_SECOND_MOMENT**0.5
"""Roundings that all agree: |error| <= u sum |t_j| <= u sqrt(n sum t_j^2), and the budget's variance is at least
0.18 u^2 sum t_j^2, so that z <= sqrt(n / 0.18) whatever the roundings do (Cauchy-Schwarz)."""


def terms(case: Case) -> int:
    """The most terms that any element of a result sums up, each with a rounding of its own."""
    longest = max(*case.packed_lengths, *case.packed_key_lengths)
    return longest * (case.heads // case.kv_heads)


def limit(case: Case) -> float:
    """LIMIT, widened where roundings must be expected to agree.

    Roundings of equal numbers are equal, and n of them add up to n instead of sqrt(n). Layers that are only a few
    channels wide make equal keys (a norm over one channel leaves a sign), and selections narrower than the heads make
    equal channels; their error grows by the square root of how many can agree.
    """
    if case.values in STRUCTURED or case.memory == "broadcast":
        # The budget allows for 8 / sqrt(n) roundings of a float32 sum, where n equal terms make up to n.
        summed = terms(case) ** 1.5 / 8 if case.dtype == "fp32" else 0.0
        return max(LIMIT, _RIGOROUS * terms(case) ** 0.5, summed)
    if case.level == "kernel":
        return LIMIT
    agreeing = 1.0
    if min(case.hidden, case.head_dim) < 4:
        agreeing = max(case.packed_lengths)
    if case.weights == "selection":
        agreeing *= max(1.0, case.heads * case.head_dim / case.hidden)
    return LIMIT * agreeing**0.5


def beyond_doubt(case: Case) -> float:
    """What no agreement of roundings explains, four times over: an error beyond it needs no second value seed.

    A race does not come back when it is asked to. Layers have more sums than this bound counts.
    """
    if case.level == "layer":
        return torch.inf
    agreeing = terms(case) ** 1.5 / 8 if case.dtype == "fp32" else 0.0
    return 4 * max(limit(case), _RIGOROUS * terms(case) ** 0.5, agreeing)


_MUCH: Final = 1 << 24
"""Elements."""

_LARGEST: Final = {"fp32": 3.4e38, "bf16": 3.3e38, "fp16": 65504.0}


def deviations(case: Case, got: torch.Tensor, expected: Expected) -> torch.Tensor:
    """z per element, ``|got - value| / sqrt(variance)``; inf where equality was owed or a finite value is missing.

    Elements whose true value does not fit the dtype owe nothing.
    """
    value, most = expected.value, 0.5 * _LARGEST[case.dtype]
    z = (got - value).abs_().div_(expected.variance.sqrt())
    # A GPU is waited for only where passing over everything takes it longer than that.
    waits = not z.is_cuda or z.numel() > _MUCH
    unsettled = z.isnan()
    if not waits or unsettled.any():
        # Equal infinities (the LSE of rows without keys) and 0 / 0 are right; all other NaN are wrong.
        z = torch.where(unsettled, torch.where(got == value, 0.0, torch.inf), z)
    if not waits or (z.numel() and not _largest(value) <= most):
        z = torch.where(value.isfinite() & (value.abs() > most), 0.0, z)
    return z


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    least, most = (each.item() for each in x.aminmax())
    return max(-least, most) if least == least else math.nan


CONTINUOUS: Final = ("gaussian", "large")
"""Value modes whose rows point in general directions, which the count of degrees of freedom rests on."""

_TAIL: Final = 30.0
"""-log of the chance of a correct row beyond the bound: 1e-13."""

_UNEVEN: Final = 1.5
"""Roundings of numbers that all begin a binade have 1.85 times the variance of roundings on average, rarely in full."""


def row_bound(degrees: torch.Tensor) -> torch.Tensor:
    """What the mean of z^2 over a row of so many independent errors stays under.

    The tail of a chi-squared variable (Laurent and Massart, 2000, lemma 1): with probability 1 - e^-t,
    ``chi^2_d <= d + 2 sqrt(d t) + 2 t``.
    """
    return _UNEVEN * (1 + 2 * (_TAIL / degrees).sqrt() + 2 * _TAIL / degrees)


def row_spreads(case: Case, got: torch.Tensor, expected: Expected) -> torch.Tensor:
    """sqrt(mean z^2 / bound) per row ``[tokens, heads]``: beyond 1, the row as a whole is off."""
    return spread_of(deviations(case, got, expected), expected)


def spread_of(z: torch.Tensor, expected: Expected) -> torch.Tensor:
    """``row_spreads`` from ``deviations``."""
    assert expected.degrees is not None
    z2 = z.square()
    # A row that owes bits, or subnormals that may be flushed, is not one of many independent errors.
    owing = (expected.variance > 0).all(-1)
    return torch.where(owing, (z2.mean(-1) / row_bound(expected.degrees)).sqrt(), 0.0)
