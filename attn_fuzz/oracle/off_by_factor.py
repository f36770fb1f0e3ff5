"""A whole head of a document that is off by one factor, where every element by itself is within its budget.

In half precision an element may be off by a percent. All of them together may not: roundings of hundreds of numbers
that have no reason to agree cancel in the factor that fits them best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.layout import Span
from attn_fuzz.reference.profile import UNIT_ROUNDOFF

_ROUNDINGS: Final = 2
"""Units of roundoff. Probabilities and results are stored in the dtype: where roundings of each agree in size and sign,
as those of the equal probabilities of uniform attention do, a factor is off by one unit for each."""

_LEANING: Final = 1.0
"""Standard deviations by which errors may lean towards the sides of their values, on average. It matters where results
are small differences of large terms, whose roundings may be any share of them."""

_UNEVEN: Final = 1.5
"""Roundings of numbers that all begin a binade have more than their average variance (deviations.py)."""


class Factors(NamedTuple):
    """The factor that fits each head of each document best, ``[documents, heads]``."""

    value: torch.Tensor
    """1 where there is nothing to fit."""
    wrong: torch.Tensor
    """bool: the factor is one that no roundings make."""


def factors(dtype: str, got: torch.Tensor, expected: Expected, spans: Sequence[Span]) -> Factors:
    """The factors of a result.

    With errors e, values v and variances s^2 the least squares factor is ``1 + sum(e v / s^2) / sum(v^2 / s^2)``. For
    independent errors its own variance is ``1 / sum(v^2 / s^2)``, and larger by elements per independent error where
    these are fewer. A wrong factor is LIMIT of its standard deviations off, _ROUNDINGS units of roundoff, and further
    than errors that lean by _LEANING put it.

    Args:
        dtype: of the result; in ``fp32`` every element is told by itself, and no factor is wrong.
        got: ``[tokens, heads, channels]``, finite.
        expected: the answer, with its degrees of freedom.
        spans: where documents lie.
    """
    assert expected.degrees is not None
    value, variance = expected.value, expected.variance
    known = variance > 0
    size = torch.where(known, value.abs() / variance.sqrt(), 0.0)
    z = torch.where(known, (got.double() - value) / variance.sqrt(), 0.0) * value.sign()
    of_rows = torch.stack([z * size, size.square(), size, known.double()]).sum(-1)
    of_rows = torch.cat([of_rows, (expected.degrees * known.any(-1))[None]])
    sums = torch.stack([of_rows[:, slice(*span)].sum(1) for span in spans], 1)
    leaning, squares, sizes, elements, degrees = sums
    independent = (_UNEVEN * elements / degrees.clamp(min=1.0) * squares).sqrt()
    off = torch.where(squares > 0, leaning / squares, 0.0)
    wrong = leaning.abs() > torch.maximum(LIMIT * independent, _LEANING * sizes)
    wrong &= off.abs() > _ROUNDINGS * UNIT_ROUNDOFF[dtype]
    return Factors(1 + off, wrong if dtype != "fp32" else torch.zeros_like(wrong))
