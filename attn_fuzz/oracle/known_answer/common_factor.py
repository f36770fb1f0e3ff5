"""Whether wrong results have the right keys, with weights that are off by a common factor: a matter of weights."""

from __future__ import annotations

from typing import Final

import torch

from attn_fuzz.oracle.known_answer.compared import Compared
from attn_fuzz.oracle.known_answer.slack import NEAR_WHOLE

_FACTORS: Final = (0.75, 1.5)
"""Between these a common factor is an error of weights; beyond, keys are missing or counted twice."""

_TELLING: Final = 4
"""Channels that are not 0: of so many +-1 another key differs in one or more, but once in 16 times."""

_ALIKE_WEIGHTS: Final = 1.1
"""How far apart the weights of a row's keys may be, as a ratio, and still be off by what they have in common."""


def weighs_otherwise(got: torch.Tensor, sums: torch.Tensor, wrong: torch.Tensor) -> bool:
    """Whether every wrong row is the right keys' sum times a factor of its own: a matter of weights, not of keys.

    A normaliser or an LSE that is rounded scales a row as a whole. A key too many, too few or another one changes
    channels by +-1, each by itself.

    Args:
        got: ``[rows, heads, d]`` float64, the sums that came out.
        sums: as ``got``; whole numbers, what they should be.
        wrong: as ``got``, bool; some are.
    """
    rows = wrong.any(-1)
    got, sums = got[rows], sums[rows]
    factor = (got * sums).sum(-1, keepdim=True) / sums.square().sum(-1, keepdim=True)
    low, high = _FACTORS
    same = ((got - factor * sums).abs() < NEAR_WHOLE).all(-1) & (sums != 0).sum(-1).ge(_TELLING)
    return bool((same & (factor[..., 0] > low) & (factor[..., 0] < high)).all())


def keys_weigh_otherwise(dv: Compared) -> bool:
    """Whether the keys of each document's hot row have weights that are off by a factor which they have in common.

    A key that does not take part has 0, one too many has something, and what is left of the others is 1 / (n - 1).

    Args:
        dv: of an output gradient of one element per document.
    """
    owed = dv.expected != 0
    if dv.got[~owed].any():
        return False
    ratio, owner = (dv.got / dv.expected)[owed], dv.document[:, None, None].expand_as(owed)[owed]
    for document in owner.unique().tolist():
        own = ratio[owner == document]
        if not (own.min() > 0 and own.max() < _ALIKE_WEIGHTS * own.min()):
            return False
    return True
