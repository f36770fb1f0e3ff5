"""terms.py over a block of scores of many documents, up to dS, for vectorised.py.

Each step takes what those before it have left and says what it writes over: tensors of a block's size are few, and are
used again as soon as no later step reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.narrow import Narrow
from attn_fuzz.reference.profile import ALIKE, ROUNDING_SECOND_MOMENT, UNIT_ROUNDOFF
from attn_fuzz.reference.rounding import ds_factor, flush_variance, rounded_alike, stored_ds_variance
from attn_fuzz.reference.sums import A2, Sums, cut_off
from attn_fuzz.reference.vectorised_scores import Scores, forward


class Documents(NamedTuple):
    """Documents of one padded size, float64, zeros where there is no row."""

    q: torch.Tensor
    """``[documents, heads, q, d]``."""
    k: torch.Tensor
    """``[documents, kv_heads, k, d]``."""
    v: torch.Tensor
    """``[documents, kv_heads, k, dv]``."""
    dout: torch.Tensor
    """``[documents, heads, q, dv]``."""
    mask: torch.Tensor
    """bool ``[documents, 1, q, k]``."""
    dlse: torch.Tensor | None = None
    """``[documents, heads, q]``; None where the LSE has no gradient."""


class Block(NamedTuple):
    """A block's tensors, heads of a group stacked as rows: ``[n, rows, d]`` and ``[n, k, d]``; and how it computes.

    V and dO have channels of their own, as many as each other.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    q2: torch.Tensor
    k2: torch.Tensor
    v2: torch.Tensor
    dout2: torch.Tensor
    dlse: torch.Tensor | None
    """``[n, rows, 1]``."""
    found: Scores
    how: Computation
    sums: Sums
    bounded: bool
    """No probability can be subnormal in float32."""
    plain: bool
    """Nor anything else that is stored, so that roundings are a factor."""

    @property
    def relative(self) -> float:
        """Variance of a rounding, in units of the square of what is stored."""
        return ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[self.how.dtype] ** 2

    @property
    def narrow(self) -> Narrow | None:
        return self.how.narrow

    @property
    def nothing(self) -> torch.Tensor:
        """Stands for sums that are not taken."""
        return torch.zeros((), dtype=self.q.dtype, device=self.q.device)


def stacked(documents: Documents, how: Computation, sums: Sums, bounded: bool) -> Block:
    """The block, its forward done."""
    count, heads, queries = documents.q.shape[:3]
    kv_heads, keys = documents.k.shape[1:3]
    stacked_rows = count * kv_heads, heads // kv_heads * queries
    q, dout = (x.reshape(*stacked_rows, x.shape[-1]) for x in (documents.q, documents.dout))
    k, v = (x.reshape(count * kv_heads, keys, x.shape[-1]) for x in (documents.k, documents.v))
    plain = bounded and how.dtype != "fp16"
    found = forward(q, k, documents.mask, (count, heads, queries, keys), how, plain=plain)
    q2, k2, v2, dout2 = (x.square() for x in (q, k, v, dout))
    dlse = None if documents.dlse is None else documents.dlse.reshape(*q.shape[:2], 1)
    return Block(q, k, v, dout, q2, k2, v2, dout2, dlse, found, how, sums, bounded, plain)


class Output(NamedTuple):
    """The output, and what the backward has of the forward."""

    out: torch.Tensor
    stored: torch.Tensor
    """Variance of the rounding of each element by itself."""
    variance: torch.Tensor
    lse_variance: torch.Tensor
    shared: torch.Tensor
    """``[n, rows, 1]``: what the probabilities of a row have in common."""
    by_row: torch.Tensor
    """``[n, rows, k]``: what each key puts into the variance, of squares of V."""
    alike: torch.Tensor | None
    """Of roundings that agree in all of a row; None where no narrow format makes any."""


def output_of(b: Block) -> Output:
    found, over_keys, narrow, v2 = b.found, b.sums.over_keys, b.narrow, b.v2
    p, w, rp = found.p, found.w, found.rp
    out = p @ b.v
    stored = b.how.rvar(out)
    shared = w.sum(-1, keepdim=True)
    lse = found.lse.masked_fill(found.lse.isinf(), 0.0)
    stored_lse = (A2 / 16) * lse.square()
    by_row = (w + rp).add_(p, alpha=over_keys)
    # sum_j w (v - o)^2, multiplied out; the difference of squares cannot go below zero by more than its own rounding,
    # which only the large errors of a tanh raise above the other terms.
    if b.how.softcap:
        spread = w @ v2 - 2 * out * (w @ b.v) + out.square() * shared
        variance = torch.add(rp, p, alpha=over_keys) @ v2 + spread.clamp_min(0) + stored
    else:
        variance = (by_row @ v2).add_(out * (out * shared - 2 * (w @ b.v))).clamp_min_(0).add_(stored)
    if b.how.profile.normalises_by_lse:
        variance += stored_lse * out.square()
    alike: torch.Tensor | None = None
    if narrow:
        alike = ALIKE * (narrow.output_alike * out).square()
        variance += found.p2 @ narrow.of_input(b.v) + alike
    shared = shared + stored_lse
    lse_variance = shared + A2 * (1 + lse.square())
    if found.mean_score is not None:
        lse_variance += cut_off(b.q.shape[-1]) * found.mean_score.square()
        if narrow:
            lse_variance += narrow.of_lse(found.mean_score)
    return Output(out, stored, variance, lse_variance, shared, by_row, alike)


class Differences(NamedTuple):
    """dP and D, and what is not known of them; written over by ``score_gradients``."""

    dp: torch.Tensor
    dp2: torch.Tensor
    var_dp: torch.Tensor
    delta: torch.Tensor
    """``[n, rows, 1]``."""
    taken: torch.Tensor
    """``[n, rows, 1]``: what is taken from dP, D less the LSE's gradient."""
    var_delta: torch.Tensor
    stored_products: torch.Tensor | None
    """Of P dP, where that is stored."""


def differences(b: Block, output: Output) -> Differences:
    found, profile, narrow = b.found, b.how.profile, b.narrow
    dp = b.dout @ b.v.mT
    dp2 = dp.square()
    weighted = b.dout * output.out
    delta = weighted.sum(-1, keepdim=True)
    folded = b.relative if b.plain and profile.rounds_dp else 0.0
    var_dp = torch.baddbmm(dp2, b.dout2, b.v2.mT, beta=folded, alpha=A2)
    if profile.rounds_dp and not b.plain:
        var_dp += b.how.rvar(dp)
    if narrow:
        var_dp += narrow.of_dp(b.dout, b.v, dp)
    var_delta = torch.zeros_like(delta)
    if profile.delta_from_output:
        var_delta = (b.dout2 * output.variance).sum(-1, keepdim=True) + A2 * weighted.square().sum(-1, keepdim=True)
        if narrow:
            var_delta += narrow.of_delta(b.dout, output.out, delta)
    stored_products = b.how.rvar(found.p * dp) if profile.stores_products else None
    if profile.delta_from_probabilities:
        relative = torch.add(found.w, found.p2, alpha=A2)
        if found.stored_p is not None:
            relative += found.stored_p
        relative.mul_(dp2).addcmul_(found.p2, var_dp)
        if stored_products is not None:
            relative += stored_products
        var_delta = var_delta + relative.sum(-1, keepdim=True)
        var_delta += (b.sums.over_keys + output.shared) * delta.square()
    taken = delta if b.dlse is None else delta - b.dlse
    return Differences(dp, dp2, var_dp, delta, taken, var_delta, stored_products)


class ScoreGradients(NamedTuple):
    """dS, ``[n, rows, k]``."""

    ds: torch.Tensor
    ds2: torch.Tensor
    var_ds: torch.Tensor
    """Written over by ``vectorised_block``."""
    pg: torch.Tensor
    """P times the slope of the cap."""


def score_gradients(b: Block, d: Differences) -> ScoreGradients:
    found, how = b.found, b.how
    p, p2, slope = found.p, found.p2, found.slope
    # float32 storage of D, dP - D and dP - D + dL, by p^2 as the error of dP itself.
    d.var_dp.add_(d.dp2, alpha=A2).add_(A2 * d.delta.square())
    if b.dlse is not None:
        d.var_dp.add_(A2 * b.dlse.square())
    of_parts = _of_parts(b, d)
    difference = d.dp.sub_(d.taken)
    difference2 = torch.mul(difference, difference, out=d.dp2)
    by_difference = found.w if found.stored_p is None else found.w + found.stored_p
    if not b.bounded:
        by_difference = by_difference + flush_variance(p)
    var_ds = d.var_dp.mul_(p2)
    if of_parts is None:
        var_ds.addcmul_(by_difference, difference2)
    else:
        var_ds.addcmul_(by_difference, of_parts.squares).add_(of_parts.stored)
    if d.stored_products is not None:
        var_ds += d.stored_products
    pg = p
    if slope is None:
        ds = difference.mul_(p)
    else:
        slope2 = slope.square()
        var_ds *= slope2
        steep = 1 - slope
        of_tanh = (A2 + how.profile.tanh_error**2) * steep
        var_ds.addcmul_(p2 * difference2, 4 * steep * (slope2 * found.raw / how.softcap**2 + of_tanh))
        pg = p * slope
        ds = difference.mul_(pg)
    ds2 = torch.mul(ds, ds, out=difference2)
    if b.plain and how.rounds_ds:
        var_ds.add_(ds2, alpha=b.relative)
    elif how.rounds_ds:
        var_ds += stored_ds_variance(ds, how.scale, how.softcap, how.dtype)
    if b.narrow:
        var_ds += b.narrow.of_ds(ds, ds_factor(how.scale, how.softcap))
    return ScoreGradients(ds, ds2, var_ds, pg)


class _Parts(NamedTuple):
    """Two ways to dS, ``[n, rows, k]``."""

    squares: torch.Tensor
    """Of what P is multiplied by on each, added up."""
    stored: torch.Tensor
    """Variance of storing both parts, and their sum."""


def _of_parts(b: Block, d: Differences) -> _Parts | None:
    """Where dS of the output and of the LSE are parts that are added up. Before dP is written over."""
    if b.dlse is None or not b.how.profile.splits_ds:
        return None
    of_output, p = d.dp - d.delta, b.found.p
    stored = sum(b.how.rvar(p * part) for part in (of_output, b.dlse.expand_as(p), of_output + b.dlse))
    return _Parts(of_output.square() + b.dlse.square(), b.dlse.sign().abs() * stored)


def alike_of(b: Block, d: Differences) -> torch.Tensor | None:
    """The most by which roundings of dS may agree in a row, on its way to dQ and dK. Before dP is written over."""
    found, scale = b.found, b.how.scale
    alike = rounded_alike(found.p, d.dp, d.taken, b.how.dtype, b.how.profile)
    return None if alike is None else alike.mul_(scale if found.slope is None else scale * found.slope)
