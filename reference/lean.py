"""attention.py and budget.py over many documents at once, in as few passes over their scores as the formulas need.

The same formulas, term by term, held equal to the pure ones by tests. What is different is the order of work: the query
heads of a group are stacked as rows over the K/V head they share, so that K/V are not repeated and gradients come out
summed; terms with a common factor become one product; intermediate tensors are written over once nobody needs them.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch

from reference.answer import Expected
from reference.budget import (
    ROUNDING_SECOND_MOMENT,
    degrees_of_freedom,
    flush_variance,
    rounding_variance,
    stored_ds_variance,
)
from reference.profile import ACCUMULATION, UNIT_ROUNDOFF, Profile

_A2: Final = ACCUMULATION**2

_NORMAL_RANGE: Final = 80.0
"""Scores of a row that lie no further apart make probabilities above 2^-125, e^-86, for up to e^6 keys."""


class Documents(NamedTuple):
    """Documents of one padded size, float64, zeros where there is no row."""

    q: torch.Tensor
    """``[documents, heads, q, d]``."""
    k: torch.Tensor
    """``[documents, kv_heads, k, d]``."""
    v: torch.Tensor
    dout: torch.Tensor
    mask: torch.Tensor
    """bool ``[documents, 1, q, k]``."""


def _bounded(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> bool:
    """Whether no probability can be subnormal in float32, by Cauchy-Schwarz. Asked on the host only: it waits."""
    if q.device.type != "cpu" or k.shape[-2] > 256:
        return False
    if softcap:
        return 2 * softcap < _NORMAL_RANGE
    longest = q.square().sum(-1).amax() * k.square().sum(-1).amax()
    return 2 * abs(scale) * math.sqrt(longest.item()) < _NORMAL_RANGE


class _Scores(NamedTuple):
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


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor,
    shape: tuple[int, ...],
    *,
    scale: float,
    softcap: float,
    dtype: str,
    profile: Profile,
    plain: bool,
) -> _Scores:
    c = ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2
    keys, keys2 = k.mT, k.square().mT
    scores = (scale * q) @ keys
    size = scale**2 * (_A2 + (2 * c if profile.scales_inputs else 0.0))
    folded = plain and profile.rounds_scores
    raw = torch.baddbmm(scores.square(), q.square(), keys2, beta=_A2 / 16 + (c if folded else 0.0), alpha=size)
    if profile.rounds_scores and not plain:
        raw += rounding_variance(scores, dtype)
    raw += _A2 + profile.exp_error**2
    slope = None
    if softcap:
        tanh = scores.div_(softcap).tanh_()
        slope = 1 - tanh.square()
        scores = tanh.mul_(softcap)
    p, lse = _softmax(scores, mask, shape)
    p2 = p.square()
    rp = c * p2 if plain else rounding_variance(p, dtype)
    if slope is None:
        w = p2 * raw
    else:
        w = (slope.square() * raw).add_(1 - slope, alpha=(_A2 + profile.tanh_error**2) * softcap**2).mul_(p2)
    return _Scores(p, p2, lse, slope, raw, w, rp)


def answer(
    documents: Documents, *, scale: float, softcap: float, dtype: str, profile: Profile, degrees: bool
) -> dict[str, Expected]:
    """Values, variances and, where asked for, degrees of freedom, by the names of ``answer.KERNEL_TENSORS``.

    Args:
        documents: padded to one size.
        scale: softmax scale.
        softcap: 0 for none.
        dtype: storage dtype.
        profile: how the backend computes.
        degrees: whether to count independent errors.

    Returns:
        ``[documents, heads, size, d]`` each, ``lse`` without the channels.
    """
    count, heads, queries, dim = documents.q.shape
    kv_heads, keys = documents.k.shape[1:3]
    group = heads // kv_heads
    q, dout = (x.reshape(count * kv_heads, group * queries, dim) for x in (documents.q, documents.dout))
    k, v = (x.reshape(count * kv_heads, keys, dim) for x in (documents.k, documents.v))
    # fp16 has subnormals in everyday numbers; the others where probabilities are extreme.
    bounded = _bounded(q, k, scale, softcap)
    plain = bounded and dtype != "fp16"
    c = ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2
    found = _forward(
        q,
        k,
        documents.mask,
        (count, heads, queries, keys),
        scale=scale,
        softcap=softcap,
        dtype=dtype,
        profile=profile,
        plain=plain,
    )
    p, p2, w, rp, slope = found.p, found.p2, found.w, found.rp, found.slope
    q2, k2, v2, dout2 = q.square(), k.square(), v.square(), dout.square()

    def rvar(x: torch.Tensor) -> torch.Tensor:
        return rounding_variance(x, dtype)

    out = p @ v
    stored_out = rvar(out)
    shared = w.sum(-1, keepdim=True)
    lse = found.lse.masked_fill(found.lse.isinf(), 0.0)
    stored_lse = (_A2 / 16) * lse.square()
    by_row = (w + rp).add_(p, alpha=_A2)
    # sum_j w (v - o)^2, multiplied out; the difference of squares cannot go below zero by more than its own rounding,
    # which only the large errors of a tanh raise above the other terms.
    if softcap:
        spread = w @ v2 - 2 * out * (w @ v) + out.square() * shared
        var_out = torch.add(rp, p, alpha=_A2) @ v2 + spread.clamp_min(0) + stored_out
    else:
        var_out = (by_row @ v2).add_(out * (out * shared - 2 * (w @ v))).clamp_min_(0).add_(stored_out)
    if profile.normalises_by_lse:
        var_out += stored_lse * out.square()
    shared = shared + stored_lse
    var_lse = shared + _A2 * (1 + lse.square())

    dp = dout @ v.mT
    dp2 = dp.square()
    weighted = dout * out
    delta = weighted.sum(-1, keepdim=True)
    folded = c if plain and profile.rounds_dp else 0.0
    var_dp = torch.baddbmm(dp2, dout2, v2.mT, beta=folded, alpha=_A2)
    if profile.rounds_dp and not plain:
        var_dp += rvar(dp)
    var_delta = torch.zeros_like(delta)
    if profile.delta_from_output:
        var_delta = (dout2 * var_out).sum(-1, keepdim=True) + _A2 * weighted.square().sum(-1, keepdim=True)
    if profile.delta_from_probabilities:
        relative = torch.add(w, p2, alpha=_A2)
        if profile.stores_probabilities:
            relative += rp
        var_delta = var_delta + relative.mul_(dp2).addcmul_(p2, var_dp).sum(-1, keepdim=True)
    # float32 storage of D and dP - D, by p^2 as the error of dP itself.
    var_dp.add_(dp2, alpha=_A2).add_(_A2 * delta.square())
    difference = dp.sub_(delta)
    difference2 = torch.mul(difference, difference, out=dp2)
    by_difference = w + rp if profile.stores_probabilities else w
    if not bounded:
        by_difference = by_difference + flush_variance(p)
    var_ds = var_dp.mul_(p2).addcmul_(by_difference, difference2)
    pg = p
    if slope is None:
        ds = difference.mul_(p)
    else:
        slope2 = slope.square()
        var_ds *= slope2
        steep = 1 - slope
        var_slope = 4 * steep * (slope2 * found.raw / softcap**2 + (_A2 + profile.tanh_error**2) * steep)
        var_ds.addcmul_(p2 * difference2, var_slope)
        pg = p * slope
        ds = difference.mul_(pg)
    ds2 = torch.mul(ds, ds, out=difference2)
    if plain:
        var_ds.add_(ds2, alpha=c)
    else:
        var_ds += stored_ds_variance(ds, scale, softcap, dtype)

    seen = pg @ k
    by_query = torch.add(var_ds, ds2, alpha=_A2)
    dq = ds @ (scale * k)
    stored_dq = rvar(dq)
    var_dq = (by_query @ k2).addcmul_(var_delta, seen.square()).mul_(scale**2)
    var_dq.addcmul_(shared, dq.square()).add_(stored_dq)
    accumulated = shared + _A2
    by_key = var_ds.addcmul_(p2 if slope is None else pg.square(), var_delta).addcmul_(ds2, accumulated)
    by_key_dv = torch.addcmul(w + rp, p2, accumulated)
    var_dk = by_key.mT @ (scale**2 * q2)
    var_dv = by_key_dv.mT @ dout2
    per_head = profile.expands_kv and group > 1
    if per_head or profile.scales_gradients:

        def of_heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(count * heads, queries, -1)

        def over_group(x: torch.Tensor) -> torch.Tensor:
            return x.view(count * kv_heads, group, keys, dim).sum(1)

        head_dk = scale * (of_heads(ds).mT @ of_heads(q))
        dk = over_group(head_dk)
        stored_heads = over_group(rvar(head_dk))
        if profile.scales_gradients:
            var_dq, var_dk = var_dq + stored_dq, var_dk + stored_heads
        if per_head:
            head_dv = of_heads(p).mT @ of_heads(dout)
            dv = over_group(head_dv)
            var_dk, var_dv = var_dk + stored_heads, var_dv + over_group(rvar(head_dv))
        else:
            dv = p.mT @ dout
    else:
        dk, dv = ds.mT @ (scale * q), p.mT @ dout
    stored_dk, stored_dv = rvar(dk), rvar(dv)
    var_dk, var_dv = var_dk + stored_dk, var_dv + stored_dv

    counted: dict[str, torch.Tensor] = {}
    if degrees:
        by_channels = scale**2 * seen.square().sum(-1)
        dq_sources = (
            scale**4 * _concentrated(by_query, k2)
            + (var_delta[..., 0] * by_channels).square()
            + (shared[..., 0] * dq.square().sum(-1)).square()
        )
        dk_sources, dv_sources = scale**4 * _concentrated(by_key.mT, q2), _concentrated(by_key_dv.mT, dout2)
        counted = {
            "out": degrees_of_freedom(var_out.sum(-1), _concentrated(by_row, v2), stored_out),
            "dq": degrees_of_freedom(var_dq.sum(-1), dq_sources, stored_dq),
            "dk": degrees_of_freedom(var_dk.sum(-1), dk_sources, stored_dk),
            "dv": degrees_of_freedom(var_dv.sum(-1), dv_sources, stored_dv),
        }
    of_rows, of_keys = (count, heads, queries), (count, kv_heads, keys)
    pairs = {"out": (out, var_out), "lse": (found.lse[..., 0], var_lse[..., 0]), "dq": (dq, var_dq)}
    pairs |= {"dk": (dk, var_dk), "dv": (dv, var_dv)}
    results: dict[str, Expected] = {}
    for name, (value, variance) in pairs.items():
        shape = (*(of_keys if name in ("dk", "dv") else of_rows), *value.shape[2:])
        degree = counted[name].view(shape[:3]) if name in counted else None
        results[name] = Expected(value.view(shape), variance.view(shape), degree)
    return results


def _concentrated(weights: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """``sum_j (weight_ij |vector_j|^2)^2``."""
    return (weights.square() @ vectors.sum(-1, keepdim=True).square())[..., 0]
