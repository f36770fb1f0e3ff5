"""Error variances of storing numbers: one by one, flushed, before or after a factor, and in the same way in a row."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.reference.profile import (
    ROUNDING_SECOND_MOMENT,
    SMALLEST_NORMAL,
    SUBNORMAL_SPACING,
    UNIT_ROUNDOFF,
    Profile,
)

_SPLIT = 2.0**-10
"""How large the lesser of two TF32 parts of a float32 number may be, in units of the number."""


def rounding_variance(x: torch.Tensor, dtype: str, factor: float = 1.0) -> torch.Tensor:
    """rvar: the error variance of storing ``x`` in ``dtype``, or ``factor * x``, divided by the factor afterwards.

    On CPUs written without a choice by element, which takes them ten times as long as an operation on all.

    Args:
        x: float64.
        dtype: storage dtype.
        factor: positive.
    """
    relative = ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2
    spacing = SUBNORMAL_SPACING[dtype] / factor
    # Just below the variance of the smallest normal number; of twice that where what is smaller may be flushed, for a
    # little error of its own takes a number there.
    smallest = max(SMALLEST_NORMAL[dtype] / factor, 2 * spacing)
    subnormal = relative * smallest**2 * (1 - 2.0**-52)
    stored = torch.threshold_(x.square().mul_(relative), subnormal, spacing**2 / 12)
    if dtype == "fp32":
        # Tensor cores take float32 operands as sums of TF32 parts; a lesser part that is subnormal is flushed.
        flushed = x.square().mul_(_SPLIT**2).clamp_max_((SMALLEST_NORMAL[dtype] / factor) ** 2)
        stored.add_(flushed, alpha=1 / 3)
    # Zero is stored without error.
    if x.is_cuda:
        return stored.masked_fill_(x == 0, 0.0)
    return stored.mul_(x.sign().square_())


def flush_variance(p: torch.Tensor) -> torch.Tensor:
    """Probabilities at the bottom of float32's range may come out as 0: fast exponentials flush subnormal results."""
    p2 = p.square()
    return p2 - torch.threshold(p2, (2 * SMALLEST_NORMAL["fp32"]) ** 2 * (1 - 2.0**-52), 0.0)


def stored_ds_variance(ds: torch.Tensor, scale: float, softcap: float, dtype: str) -> torch.Tensor:
    """The error of storing dS, which kernels do before or after they have multiplied it by the scale or scale / cap.

    For normal numbers that makes no difference; a subnormal product keeps fewer digits.
    """
    return rounding_variance(ds, dtype, ds_factor(scale, softcap))


def ds_factor(scale: float, softcap: float) -> float:
    """The least that dS may have been multiplied by before it is stored."""
    return min(1.0, abs(scale), abs(scale / softcap) if softcap else 1.0)


_CLOSE = 16
"""Spread of a row's weights, in units of roundoff, below which storing them leaves a few different ones."""


def rounded_alike(
    p: torch.Tensor, dp: torch.Tensor, delta: torch.Tensor, dtype: str, profile: Profile
) -> torch.Tensor | None:
    """The most by which each dS may be off in the same way as all others of its row.

    Products P dP that are stored, or of a stored dP and a P that is nearly constant, lie on the grid of the numbers
    that dS is rounded to, or next to it. What is left to round then is P D alone, a function of the row's weights and
    thus of its scores: errors go with q and k, and n of them add up to n. Seen in float16 with one channel on
    2,059 keys, whose dS are subnormal and have a grid in common (docs/oracle.md).

    Args:
        p: ``[..., q, k]``.
        dp: as ``p``; dP.
        delta: ``[..., q, 1]``; D.
        dtype: storage dtype.
        profile: how the backend computes.

    Returns:
        As ``p``; None where nothing of the kind is to be expected.
    """
    if (form := profile.scores_dtype) and not (form == dtype and profile.rounds_dp):
        plain = dataclasses.replace(profile, scores_dtype="")
        own = rounded_alike(p, dp, delta, dtype, plain)
        narrow = rounded_alike(p, dp, delta, form, dataclasses.replace(plain, rounds_dp=True, rounds_ds=True))
        assert narrow is not None
        return narrow if own is None else torch.maximum(own, narrow)
    if not (profile.stores_products or profile.may_store_products or profile.rounds_dp):
        return None
    if not profile.rounds_ds and dtype != "fp32":
        return None
    products = (p * dp).abs_()
    half_spacing = (products * UNIT_ROUNDOFF[dtype]).clamp_min_(SUBNORMAL_SPACING[dtype] / 2)
    most = torch.minimum(half_spacing, (p * delta).abs_())
    if profile.stores_products:
        return most
    # Up to twice the smallest normal number all have one grid; beyond, those of one exponent.
    subnormal = (products < 2 * SMALLEST_NORMAL[dtype]) if profile.may_store_products else None
    largest = p.amax(-1, keepdim=True) if p.shape[-1] else p.sum(-1, keepdim=True)
    # Keys that a row does not see have no weight, and are no part of it.
    apart = ((p - largest).abs_() > _CLOSE * UNIT_ROUNDOFF[dtype] * largest).logical_and_(p > 0)
    free = apart.any(-1, keepdim=True)
    return most.masked_fill_(free if subnormal is None else free & ~subnormal, 0.0)
