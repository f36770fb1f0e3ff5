"""The forward of vectorised.py: scores and probabilities of many documents, with what the budget has of them."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.profile import ROUNDING_SECOND_MOMENT, UNIT_ROUNDOFF
from attn_fuzz.reference.rounding import rounding_variance
from attn_fuzz.reference.sums import A2, cut_off

_NORMAL_RANGE: Final = 86.0
"""Scores of a row of n keys that lie no further apart than this less log n make probabilities above 2^-125, e^-86.6."""


def bounded_scores(q: torch.Tensor, k: torch.Tensor, keys: int, how: Computation) -> bool:
    """Whether no probability can be subnormal in float32, by Cauchy-Schwarz. Waits for the device.

    Args:
        q: ``[..., d]``, any number of rows.
        k: ``[..., d]``, those that they may meet, and others.
        keys: of the document with most of them.
        how: the call computes.
    """
    apart = _NORMAL_RANGE - math.log(max(keys, 1))
    if how.softcap:
        return 2 * how.softcap < apart
    longest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).amax() for x in (q, k)]
    return 2 * abs(how.scale) * (longest[0] * longest[1]).item() < apart


class Scores(NamedTuple):
    """The forward and what the budget has of it, rows of a group stacked: ``[n, rows, k]`` and ``[n, rows, d]``."""

    p: torch.Tensor
    p2: torch.Tensor
    lse: torch.Tensor
    """``[n, rows, 1]``."""
    slope: torch.Tensor | None
    """None without softcap, where it is 1."""
    raw: torch.Tensor
    """Variance of an uncapped score."""
    w: torch.Tensor
    """``p^2`` times the variance of a (capped) score."""
    rp: torch.Tensor
    """Of P as an operand."""
    stored_p: torch.Tensor | None
    """Of P as the backward has it, where it is kept at all."""
    mean_score: torch.Tensor | None
    """``sum_j p_ij s_ij [n, rows, 1]``, of scores before the cap; None where no narrow format needs it."""


def _softmax(scores: torch.Tensor, mask: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, lse) in the place of the scores; rows without keys give 0 and -inf."""
    if not scores.shape[-1]:
        return scores, scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    scores.view(shape).masked_fill_(~mask, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    blind = highest == -torch.inf
    p = scores.softmax(-1).masked_fill_(blind, 0.0)
    # The highest probability is 1 over the row's sum.
    return p, (highest - p.amax(-1, keepdim=True).log()).masked_fill_(blind, -torch.inf)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor,
    shape: tuple[int, ...],
    how: Computation,
    *,
    plain: bool,
) -> Scores:
    """Scores and probabilities, with what the budget has of them.

    Args:
        q: ``[n, rows, d]`` float64, rows of a group stacked.
        k: ``[n, k, d]``.
        mask: bool ``[documents, 1, q, k]``.
        shape: of all scores, ``(documents, heads, q, k)``.
        how: the call computes.
        plain: nothing that is stored can be subnormal, so that roundings are a factor.
    """
    scale, softcap, dtype, profile = how.scale, how.softcap, how.dtype, how.profile
    c = ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2
    keys, keys2 = k.mT, k.square().mT
    scores = (scale * q) @ keys
    size = scale**2 * (A2 + (2 * c if profile.scales_inputs else 0.0))
    folded = plain and profile.rounds_scores
    raw = torch.baddbmm(scores.square(), q.square(), keys2, beta=A2 / 16 + (c if folded else 0.0), alpha=size)
    if profile.rounds_scores and not plain:
        raw += rounding_variance(scores, dtype)
    raw += A2 + profile.exp_error**2
    narrow = how.narrow
    uncapped = None
    if narrow:
        raw += narrow.of_scores(q, k, scale, scores)
    cut = cut_off(q.shape[-1])
    if narrow or cut:
        uncapped = scores.clone()
    slope = None
    if softcap:
        tanh = scores.div_(softcap).tanh_()
        slope = 1 - tanh.square()
        scores = tanh.mul_(softcap)
    p, lse = _softmax(scores, mask, shape)
    p2 = p.square()
    rp = c * p2 if plain else rounding_variance(p, dtype)
    stored_p = rp if profile.stores_probabilities else None
    if not how.rounds_p:
        rp = torch.zeros_like(p)
    mean_score = None
    if narrow:
        rp = rp + narrow.of_weights(p)
        stored_p = narrow.stored_too(p, stored_p)
    if uncapped is not None:
        mean_score = uncapped.mul_(p).sum(-1, keepdim=True)
    if slope is None:
        w = p2 * raw
    else:
        w = (slope.square() * raw).add_(1 - slope, alpha=(A2 + profile.tanh_error**2) * softcap**2).mul_(p2)
    return Scores(p, p2, lse, slope, raw, w, rp, stored_p, mean_score)
