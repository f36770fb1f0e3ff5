"""How much error correct arithmetic may make, per element, for one document.

Variances of independent roundings, propagated once through the formulas of attention.py; sums run over allowed pairs.
With u the unit roundoff of the storage dtype, eta its subnormal spacing and a the accumulation error (profile.py):

    rvar(x)  = 0.18 u^2 x^2 for normal x, eta^2 / 12 for subnormal x, 0 for x = 0
    vs_ij    = g_ij^2 a^2 (scale^2 sum_c q^2 k^2 + s_ij^2 / 16 + 1) + a^2 (cap t)^2 [+ rvar(s_ij)]      error of a score
    V(o_ic)  = sum_j rvar(p_ij) v_jc^2 + sum_j p_ij^2 vs_ij (v_jc - o_ic)^2 + ak^2 sum_j p_ij v_jc^2 + rvar(o_ic)
    V(D_i)   = sum_c do_ic^2 V(o_ic) + a^2 sum_c (do_ic o_ic)^2         of the stored output, or
               sum_j V(p_ij dP_ij) + (ak^2 + V(L_i)) D_i^2                     of P and dP, as the profile says
    V(dS_ij) = rvar(dS_ij) + p_ij^2 vs_ij (dP_ij - D_i)^2 + p_ij^2 (a^2 sum_c do_ic^2 v_jc^2 [+ rvar(dP_ij)])
    V(L_i)   = sum_j p_ij^2 vs_ij                                       error of a row's normaliser, common to its keys
    V(dq_ic) = scale^2 sum_j V(dS_ij) k_jc^2 + V(D_i) (scale sum_j p_ij g_ij k_jc)^2 + V(L_i) dq_ic^2 + rvar(dq_ic)
    V(dk_jc) = scale^2 sum_i (V(dS_ij) + p_ij^2 g_ij^2 V(D_i) + V(L_i) dS_ij^2) q_ic^2 + rvar(dk_jc)
    V(dv_jc) = sum_i (rvar(p_ij) + p_ij^2 (vs_ij + V(L_i))) do_ic^2 + rvar(dv_jc)

Where dP is stored, dS can round alike in all of a row, a column (``rounded_alike``); then dq and dk also have

    (scale sum_j g_ij m_ij |k_jc|)^2 / 25   and   (scale sum_i g_ij m_ij |q_ic|)^2 / 25   with m the most that it does.

ak^2 = a^2 + 0.09 u32^2 n for a float32 sum over n keys, and likewise over query rows (``sums_of``); dq, dk and dv have
such a term of their own, as scale^2 ak^2 sum_j dS_ij^2 k_jc^2. dv also allows for probabilities that are flushed.

Formats narrower than the dtype's (TF32 products and the like) add terms of their own: see narrow.py.

0.18 is E[eps^2] / u^2 of round-to-nearest for mantissas spread as 1/x. Bracketed terms apply where the backend's
profile says so. The margin between z = 1 and the verdict's z = 10 is measured, not assumed: see docs/oracle.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from attn_fuzz.reference.attention import Forward, Gradients, sum_groups
from attn_fuzz.reference.narrow import ByKey, KeyAlike, Narrow
from attn_fuzz.reference.profile import (
    ACCUMULATION,
    ALIKE,
    ATOMIC_TILE,
    PARTIAL_SUM_KEYS,
    ROUNDING_SECOND_MOMENT,
    SMALLEST_NORMAL,
    SUBNORMAL_SPACING,
    UNIT_ROUNDOFF,
    Profile,
)

_SPLIT = 2.0**-10
"""How large the lesser of two TF32 parts of a float32 number may be, in units of the number."""


class Sums(NamedTuple):
    """How sums over a document's keys and query rows round, beyond what a few partial sums do."""

    over_keys: float
    """Squared error of a float32 sum over keys, in units of its terms' squares."""
    over_rows: float
    """The same over query rows."""
    stored: int
    """How often the running sums of dK and dV are stored in the dtype before they are complete."""
    stored_dq: int
    """The same for those of dQ."""
    atomic_dq: int = 0
    """How often the share of a tile is rounded and added to dQ in the dtype, where it is."""
    atomic_dk: int = 0
    """The same for dK, the tiles of all query heads of a group together."""
    atomic_dv: int = 0


_SEQUENTIAL = ROUNDING_SECOND_MOMENT / 2 * UNIT_ROUNDOFF["fp32"] ** 2
"""A sum taken term by term rounds as often as it has terms, of partial sums with half its square on average."""


def sums_of(queries: int, keys: int, profile: Profile, group: int = 1) -> Sums:
    """For a call whose longest document has so many queries, and whose longest has so many keys.

    Args:
        queries: rows of the document with most of them.
        keys: the same.
        profile: how the backend computes.
        group: query heads per K/V head.
    """
    stored = stored_dq = 0
    # torch's blocks; a document's first and last are parts of one each.
    if profile.stores_partial_sums and queries > 1:
        stored = math.ceil(queries / (32 if queries < 192 else 64 if queries < 768 else 256))
    if profile.stores_partial_sums and keys > 1:
        stored_dq = math.ceil(keys / PARTIAL_SUM_KEYS)
    key_tiles, row_tiles = math.ceil(keys / ATOMIC_TILE), group * math.ceil(queries / ATOMIC_TILE)
    tiles = {"dq": key_tiles, "dk": row_tiles, "dv": row_tiles}
    return Sums(
        ACCUMULATION**2 + _SEQUENTIAL * keys,
        ACCUMULATION**2 + _SEQUENTIAL * queries,
        stored,
        stored_dq,
        *(count if name in profile.atomic_sums else 0 for name, count in tiles.items()),
    )


def walk_variance(times: int, dtype: str) -> float:
    """What storing a running sum so often makes of it, in units of its terms' squares.

    Partial sums of a random walk that is to end where it does: half-way as large as all of its terms on average.
    """
    return times / 6 * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2


def atomic_variance(times: int, dtype: str) -> float:
    """What adding so many shares in the dtype makes of a sum: each share is rounded, and each running sum.

    In units of the terms' squares, of which every share has its part.
    """
    return (1 + times / 6) * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2 if times else 0.0


class Variances(NamedTuple):
    """Error variances of one document's results, shaped as the results (dk, dv per K/V head)."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    degrees: dict[str, torch.Tensor]
    """Independent errors in each row of out, dq, dk and dv, without the channels; empty where nobody asked."""
    gradients: Gradients
    """What the variances are about, dk and dv per K/V head, computed on the way."""


def degrees_of_freedom(total: torch.Tensor, sources: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
    """How many independent errors the channels of a row share, between 1 and their number.

    A row's error is a sum over sources j (keys, or queries) of a scalar error times a vector over channels, plus the
    rounding of each channel. With s_j the variance that source j puts into the row, all channels together, the matrix
    of its error has (tr A)^2 / tr A^2 = 1 / (1 / channels + sum_j s_j^2 / (sum_j s_j)^2) degrees of freedom where the
    vectors are in general position.

    Args:
        total: ``[..., rows]``, the row's whole variance.
        sources: ``[..., rows]``, ``sum_j s_j^2``.
        rounding: ``[..., rows, d]``, rounding variance of the stored result.
    """
    concentration = (sources + rounding.square().sum(-1)) / total.square()
    return 1 / (1 / rounding.shape[-1] + concentration.nan_to_num(1.0).clamp(0, 1))


def rounding_variance(x: torch.Tensor, dtype: str, factor: float = 1.0) -> torch.Tensor:
    """rvar: the error variance of storing ``x`` in ``dtype``, or ``factor * x``, divided by the factor afterwards.

    Written without a choice by element, which takes a processor ten times as long as an operation on all of them.

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
        narrow = rounded_alike(p, dp, delta, form, dataclasses.replace(plain, rounds_dp=True))
        assert narrow is not None
        return narrow if own is None else torch.maximum(own, narrow)
    if not (profile.stores_products or profile.may_store_products or profile.rounds_dp):
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


def attention_variances(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    result: Forward,
    *,
    scale: float,
    softcap: float,
    group: int,
    dtype: str,
    profile: Profile,
    degrees: bool = True,
    sums: Sums | None = None,
) -> Variances:
    """The budget of one document, for K/V with one head per query head; leading dimensions are documents of one size.

    Args:
        q: ``[..., heads, q, d]`` float64, as rounded to ``dtype``.
        k: ``[..., heads, k, d]``, expanded to the query heads.
        v: as ``k``.
        dout: as ``q``.
        result: of ``attention.forward`` on them.
        scale: softmax scale.
        softcap: 0 for none.
        group: query heads per K/V head.
        dtype: storage dtype.
        profile: how the backend computes.
        degrees: whether to count independent errors too.
        sums: of the call; those of a call of these documents when not given.
    """
    a2 = ACCUMULATION**2
    sums = sums or sums_of(q.shape[-2], k.shape[-2], profile, group)
    over_keys, times_stored = sums.over_keys, sums.stored
    over_rows = sums.over_rows + walk_variance(times_stored, dtype)
    dk_over_rows = over_rows + atomic_variance(sums.atomic_dk, dtype)
    dv_over_rows = over_rows + atomic_variance(sums.atomic_dv, dtype)
    # Of dQ; the output's sum over keys is kept in float32.
    dq_over_keys = over_keys + walk_variance(sums.stored_dq, dtype) + atomic_variance(sums.atomic_dq, dtype)
    dq_stored = sums.stored_dq + sums.atomic_dq
    narrow = Narrow.of(dtype, profile)

    def rvar(x: torch.Tensor) -> torch.Tensor:
        return rounding_variance(x, dtype)

    p, slope, out = result.probabilities, result.slope, result.out
    p2, q2, k2, v2, dout2 = (p.square(), q.square(), k.square(), v.square(), dout.square())
    products = scale**2 * (q2 @ k2.transpose(-1, -2))
    scores = scale * (q @ k.transpose(-1, -2))
    # A float32 score is stored, and so is the row's normaliser that is taken from it: a / 4 of their size.
    raw = a2 * (products + 1 + scores.square() / 16)
    if profile.scales_inputs:
        raw = raw + 2 * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2 * products
    if profile.rounds_scores:
        raw = raw + rvar(scores)
    raw = raw + profile.exp_error**2
    if narrow:
        raw = raw + narrow.of_scores(q, k, scale, scores)
    vs = raw
    if softcap:
        vs = slope.square() * raw + (a2 + profile.tanh_error**2) * softcap**2 * (1 - slope)
    w = p2 * vs
    # A row's normaliser moves with all its scores: the relative error that its probabilities have in common.
    shared = w.sum(-1, keepdim=True)
    lse = result.lse.masked_fill(~result.lse.isfinite(), 0.0)
    # A backward that recomputes P from the stored float32 LSE scales each row by that LSE's rounding.
    stored_lse = a2 * lse.square()[..., None] / 16
    rp = rvar(p)
    stored_p = rp if profile.stores_probabilities else None
    if narrow:
        rp = rp + narrow.of_weights(p)
        stored_p = narrow.stored_too(p, stored_p)
    # sum_j w (v - o)^2, multiplied out; the difference of squares cannot go below zero by more than its own rounding.
    spread = w @ v2 - 2 * out * (w @ v) + out.square() * shared
    var_out = rp @ v2 + spread.clamp_min(0) + over_keys * (p @ v2) + rvar(out)
    if profile.normalises_by_lse:
        var_out = var_out + stored_lse * out.square()
    if narrow:
        alike_out = ALIKE * (narrow.output_alike * out).square()
        var_out = var_out + p2 @ narrow.of_input(v) + alike_out
    shared = shared + stored_lse
    # Stored LSE: the error of its scores, and of a float32 logarithm and sum.
    var_lse = shared[..., 0] + a2 * (1 + lse.square())
    if narrow:
        var_lse = var_lse + narrow.of_lse((p * scores).sum(-1))

    dp = dout @ v.transpose(-1, -2)
    delta = (dout * out).sum(-1, keepdim=True)
    var_dp = a2 * (dout2 @ v2.transpose(-1, -2))
    if profile.rounds_dp:
        var_dp = var_dp + rvar(dp)
    if narrow:
        var_dp = var_dp + narrow.of_dp(dout, v, dp)
    var_delta = torch.zeros_like(delta)
    if profile.delta_from_output:
        var_delta = (
            var_delta + (dout2 * var_out).sum(-1, keepdim=True) + a2 * (dout * out).square().sum(-1, keepdim=True)
        )
        if narrow:
            var_delta = var_delta + narrow.of_delta(dout, out, delta)
    if profile.delta_from_probabilities:
        relative = p2 * var_dp + (w + a2 * p2) * dp.square()
        if stored_p is not None:
            relative = relative + stored_p * dp.square()
        # Its sum rounds, and so does the normaliser that all its terms share.
        if profile.stores_products:
            relative = relative + rvar(p * dp)
        var_delta = var_delta + relative.sum(-1, keepdim=True) + (over_keys + shared) * delta.square()
    ds = p * (dp - delta) * slope
    slope2 = slope.square()
    # float32 storage of D and dP - D: cancellation leaves a share of their own size even where dS is 0.
    cancelled = a2 * p2 * (dp.square() + delta.square())
    var_ds = stored_ds_variance(ds, scale, softcap, dtype) + slope2 * (
        w * (dp - delta).square() + p2 * var_dp + cancelled
    )
    var_ds = var_ds + slope2 * flush_variance(p) * (dp - delta).square()
    if stored_p is not None:
        var_ds = var_ds + slope2 * stored_p * (dp - delta).square()
    if profile.stores_products:
        var_ds = var_ds + slope2 * rvar(p * dp)
    if softcap:
        # 1 - t^2 moves with the score's own error and the tanh's.
        var_slope = 4 * (1 - slope) * (slope2 * raw / softcap**2 + (a2 + profile.tanh_error**2) * (1 - slope))
        var_ds = var_ds + (p * (dp - delta)).square() * var_slope
    if narrow:
        var_ds = var_ds + narrow.of_ds(ds, ds_factor(scale, softcap))
    pg = p * slope
    dq, dk, dv = (scale * (ds @ k), scale * (ds.transpose(-1, -2) @ q), p.transpose(-1, -2) @ dout)
    ds2 = ds.square()
    var_dq = (
        scale**2 * (var_ds @ k2 + var_delta * (pg @ k).square() + dq_over_keys * (ds2 @ k2))
        + shared * dq.square()
        + (1 + dq_stored) * rvar(dq)
    )
    by_key = (var_ds + pg.square() * var_delta + (dk_over_rows + shared) * ds2).transpose(-1, -2)
    var_dk_head = scale**2 * (by_key @ q2)
    by_key_dv = (rp + w + flush_variance(p) + (dv_over_rows + shared) * p2).transpose(-1, -2)
    var_dv_head = by_key_dv @ dout2
    if narrow:
        alike_dq_narrow = ALIKE * (narrow.scores_alike * dq).square()
        var_dq = var_dq + scale**2 * (ds2 @ narrow.of_input(k)) + alike_dq_narrow
        var_dk_head = var_dk_head + scale**2 * (ds2.transpose(-1, -2) @ narrow.of_input(q))
        var_dv_head = var_dv_head + p2.transpose(-1, -2) @ narrow.of_input(dout)
    alike_dq = alike_dk = None
    if (alike := rounded_alike(p, dp, delta, dtype, profile)) is not None:
        alike = scale * slope * alike
        alike_dq = ALIKE * (alike @ k.abs()).square()
        alike_dk = ALIKE * sum_groups(alike.transpose(-1, -2) @ q.abs(), group).square()
        var_dq = var_dq + alike_dq
    if profile.scales_gradients:
        var_dq, var_dk_head = var_dq + rvar(dq), var_dk_head + rvar(dk)
    if profile.expands_kv and group > 1:
        by_head = 1 + times_stored
        var_dk_head, var_dv_head = var_dk_head + by_head * rvar(dk), var_dv_head + by_head * rvar(dv)
        times_stored = 0
    gradients = Gradients(dq, sum_groups(dk, group), sum_groups(dv, group))
    stored_dk = (1 + times_stored + sums.atomic_dk) * rvar(gradients.dk)
    stored_dv = (1 + times_stored + sums.atomic_dv) * rvar(gradients.dv)
    var_dk, var_dv = sum_groups(var_dk_head, group) + stored_dk, sum_groups(var_dv_head, group) + stored_dv
    if alike_dk is not None:
        var_dk = var_dk + alike_dk
    of_keys: KeyAlike | None = None
    if narrow:
        met = ByKey(sum_groups(p.sum(-2)[..., None], group)[..., 0], sum_groups(p.transpose(-1, -2) @ q, group))
        keys, values = (x.unflatten(-3, (-1, group)).select(-3, 0) for x in (k, v))
        of_keys = narrow.of_keys(keys, values, gradients, met, scale)
        var_dk, var_dv = var_dk + of_keys.dk, var_dv + of_keys.dv

    if not degrees:
        return Variances(var_out, var_lse, var_dq, var_dk, var_dv, {}, gradients)

    def concentrated(weights: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """sum_j (weight_ij |vector_j|^2)^2"""
        return (weights.square() @ vectors.sum(-1, keepdim=True).square())[..., 0]

    by_channels = scale**2 * (pg @ k).square().sum(-1)
    dq_sources = (
        scale**4 * concentrated(var_ds + dq_over_keys * ds2, k2)
        + (var_delta[..., 0] * by_channels).square()
        + (shared[..., 0] * dq.square().sum(-1)).square()
    )
    dk_sources = sum_groups(scale**4 * concentrated(by_key, q2)[..., None], group)[..., 0]
    if alike_dq is not None and alike_dk is not None:
        dq_sources = dq_sources + alike_dq.sum(-1).square()
        dk_sources = dk_sources + alike_dk.sum(-1).square()
    dv_sources = sum_groups(concentrated(by_key_dv, dout2)[..., None], group)[..., 0]
    out_sources = concentrated(rp + over_keys * p + w, v2)
    if narrow and of_keys:
        out_sources = out_sources + alike_out.sum(-1).square()
        dq_sources = dq_sources + alike_dq_narrow.sum(-1).square()
        dk_sources, dv_sources = dk_sources + of_keys.dk_sources, dv_sources + of_keys.dv_sources
    return Variances(
        out=var_out,
        lse=var_lse,
        dq=var_dq,
        dk=var_dk,
        dv=var_dv,
        degrees={
            "out": degrees_of_freedom(var_out.sum(-1), out_sources, rvar(out)),
            "dq": degrees_of_freedom(var_dq.sum(-1), dq_sources, (1 + dq_stored) * rvar(dq)),
            "dk": degrees_of_freedom(var_dk.sum(-1), dk_sources, stored_dk),
            "dv": degrees_of_freedom(var_dv.sum(-1), dv_sources, stored_dv),
        },
        gradients=gradients,
    )
