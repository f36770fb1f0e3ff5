"""The terms of budget.py's formulas that its results have in common, each computed once and when it is first asked for.

Names are those of the formulas there: ``w`` is p^2 vs, ``raw`` the variance of a score before the cap.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

from attn_fuzz.reference.attention import Forward
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.profile import ALIKE, ROUNDING_SECOND_MOMENT, UNIT_ROUNDOFF
from attn_fuzz.reference.rounding import ds_factor, flush_variance, rounded_alike, stored_ds_variance
from attn_fuzz.reference.sums import A2, Sums, atomic_variance, cut_off, walk_variance


class Document(NamedTuple):
    """One document, or several of one size in leading dimensions; K/V with one head per query head."""

    q: torch.Tensor
    """``[..., heads, q, d]`` float64, as rounded to the dtype."""
    k: torch.Tensor
    """``[..., heads, k, d]``, expanded to the query heads."""
    v: torch.Tensor
    """``[..., heads, k, dv]``, likewise."""
    dout: torch.Tensor
    """``[..., heads, q, dv]``, as the output."""
    dlse: torch.Tensor | None = None
    """``[..., heads, q]``; None where the LSE has no gradient."""


class Terms:
    """Of one document.

    Args:
        document: its tensors.
        result: of ``attention.forward`` on them.
        how: the call computes.
        sums: of the call.
    """

    def __init__(self, document: Document, result: Forward, how: Computation, sums: Sums) -> None:
        self.q, self.k, self.v, self.dout, dlse = document
        self.q2, self.k2, self.v2, self.dout2 = (x.square() for x in (self.q, self.k, self.v, self.dout))
        self.dlse = self.q.new_zeros(()) if dlse is None else dlse[..., None]
        self.p, self.slope, self.out = result.probabilities, result.slope, result.out
        self.p2, self.slope2 = self.p.square(), self.slope.square()
        self.lse = result.lse.masked_fill(~result.lse.isfinite(), 0.0)
        self.how, self.profile, self.narrow, self.sums = how, how.profile, how.narrow, sums

    # Sums.

    @cached_property
    def dq_over_keys(self) -> float:
        """Of dQ; the output's sum over keys is kept in float32."""
        sums, dtype = self.sums, self.how.dtype
        return sums.over_keys + walk_variance(sums.stored_dq, dtype) + atomic_variance(sums.atomic_dq, dtype)

    def over_rows(self, atomic: int) -> float:
        """Of dK or dV, to which so many tiles are added in the dtype."""
        over_rows = self.sums.over_rows + walk_variance(self.sums.stored, self.how.dtype)
        return over_rows + atomic_variance(atomic, self.how.dtype)

    # Forward.

    @cached_property
    def scores(self) -> torch.Tensor:
        return self.how.scale * (self.q @ self.k.transpose(-1, -2))

    @cached_property
    def raw(self) -> torch.Tensor:
        how, profile = self.how, self.profile
        products = how.scale**2 * (self.q2 @ self.k2.transpose(-1, -2))
        # A float32 score is stored, and so is the row's normaliser that is taken from it: a / 4 of their size.
        raw = A2 * (products + 1 + self.scores.square() / 16)
        if profile.scales_inputs:
            raw = raw + 2 * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[how.dtype] ** 2 * products
        if profile.rounds_scores:
            raw = raw + how.rvar(self.scores)
        raw = raw + profile.exp_error**2
        if self.narrow:
            raw = raw + self.narrow.of_scores(self.q, self.k, how.scale, self.scores)
        return raw

    @cached_property
    def w(self) -> torch.Tensor:
        vs, softcap = self.raw, self.how.softcap
        if softcap:
            vs = self.slope2 * self.raw + (A2 + self.profile.tanh_error**2) * softcap**2 * (1 - self.slope)
        return self.p2 * vs

    @cached_property
    def moved(self) -> torch.Tensor:
        """A row's normaliser moves with all its scores: the relative error that its probabilities have in common."""
        return self.w.sum(-1, keepdim=True)

    @cached_property
    def stored_lse(self) -> torch.Tensor:
        """A backward that recomputes P from the stored float32 LSE scales each row by that LSE's rounding."""
        return A2 * self.lse.square()[..., None] / 16

    @cached_property
    def shared(self) -> torch.Tensor:
        """What the probabilities of a row have in common in the backward."""
        return self.moved + self.stored_lse

    @cached_property
    def rp(self) -> torch.Tensor:
        """Of P as an operand."""
        rp = self.how.rvar(self.p) if self.how.rounds_p else torch.zeros_like(self.p)
        return rp + self.narrow.of_weights(self.p) if self.narrow else rp

    @cached_property
    def stored_p(self) -> torch.Tensor | None:
        """Of P as the backward has it, where it is kept at all."""
        stored_p = self.how.rvar(self.p) if self.profile.stores_probabilities else None
        return self.narrow.stored_too(self.p, stored_p) if self.narrow else stored_p

    @cached_property
    def alike_out(self) -> torch.Tensor | None:
        """Of roundings that agree in all of an output row."""
        return ALIKE * (self.narrow.output_alike * self.out).square() if self.narrow else None

    @cached_property
    def var_out(self) -> torch.Tensor:
        p, v2, out, w = self.p, self.v2, self.out, self.w
        # sum_j w (v - o)^2, multiplied out; the difference of squares cannot go below zero by more than its rounding.
        spread = w @ v2 - 2 * out * (w @ self.v) + out.square() * self.moved
        var_out = self.rp @ v2 + spread.clamp_min(0) + self.sums.over_keys * (p @ v2) + self.how.rvar(out)
        if self.profile.normalises_by_lse:
            var_out = var_out + self.stored_lse * out.square()
        if self.narrow and self.alike_out is not None:
            var_out = var_out + self.p2 @ self.narrow.of_input(self.v) + self.alike_out
        return var_out

    @cached_property
    def var_lse(self) -> torch.Tensor:
        """Stored LSE: the error of its scores, and of a float32 logarithm and sum."""
        var_lse = self.shared[..., 0] + A2 * (1 + self.lse.square())
        if cut := cut_off(self.q.shape[-1]):
            var_lse = var_lse + cut * (self.p * self.scores).sum(-1).square()
        if self.narrow:
            var_lse = var_lse + self.narrow.of_lse((self.p * self.scores).sum(-1))
        return var_lse

    # Backward, up to dS.

    @cached_property
    def dp(self) -> torch.Tensor:
        return self.dout @ self.v.transpose(-1, -2)

    @cached_property
    def delta(self) -> torch.Tensor:
        return (self.dout * self.out).sum(-1, keepdim=True)

    @cached_property
    def taken(self) -> torch.Tensor:
        """What is taken from dP: D, less the LSE's gradient."""
        return self.delta - self.dlse

    @cached_property
    def difference2(self) -> torch.Tensor:
        """What P is multiplied by, squared; of two ways to dS, each has errors of P of its own."""
        if self.profile.splits_ds:
            return (self.dp - self.delta).square() + self.dlse.square()
        return (self.dp - self.taken).square()

    @cached_property
    def var_dp(self) -> torch.Tensor:
        var_dp = A2 * (self.dout2 @ self.v2.transpose(-1, -2))
        if self.profile.rounds_dp:
            var_dp = var_dp + self.how.rvar(self.dp)
        if self.narrow:
            var_dp = var_dp + self.narrow.of_dp(self.dout, self.v, self.dp)
        return var_dp

    @cached_property
    def var_delta(self) -> torch.Tensor:
        dout, out, delta = self.dout, self.out, self.delta
        var_delta = torch.zeros_like(delta)
        if self.profile.delta_from_output:
            own = A2 * (dout * out).square().sum(-1, keepdim=True)
            var_delta = var_delta + (self.dout2 * self.var_out).sum(-1, keepdim=True) + own
            if self.narrow:
                var_delta = var_delta + self.narrow.of_delta(dout, out, delta)
        if self.profile.delta_from_probabilities:
            # Its sum rounds, and so does the normaliser that all its terms share.
            common = (self.sums.over_keys + self.shared) * delta.square()
            var_delta = var_delta + self._weighted_dp().sum(-1, keepdim=True) + common
        return var_delta

    def _weighted_dp(self) -> torch.Tensor:
        """Of the products P dP."""
        found = self.p2 * self.var_dp + (self.w + A2 * self.p2) * self.dp.square()
        if self.stored_p is not None:
            found = found + self.stored_p * self.dp.square()
        if self.profile.stores_products:
            found = found + self.how.rvar(self.p * self.dp)
        return found

    @cached_property
    def ds(self) -> torch.Tensor:
        return self.p * (self.dp - self.taken) * self.slope

    @cached_property
    def ds2(self) -> torch.Tensor:
        return self.ds.square()

    @cached_property
    def pg(self) -> torch.Tensor:
        return self.p * self.slope

    @cached_property
    def var_ds(self) -> torch.Tensor:
        how, slope2, difference2 = self.how, self.slope2, self.difference2
        # float32 storage of D, dP - D and dP - D + dL: what cancels leaves a share of their own size where dS is 0.
        cancelled = A2 * self.p2 * (self.dp.square() + self.delta.square() + self.dlse.square())
        var_ds = slope2 * (self.w * difference2 + self.p2 * self.var_dp + cancelled)
        if how.rounds_ds:
            var_ds = stored_ds_variance(self.ds, how.scale, how.softcap, how.dtype) + var_ds
        var_ds = var_ds + slope2 * flush_variance(self.p) * difference2
        if self.stored_p is not None:
            var_ds = var_ds + slope2 * self.stored_p * difference2
        if self.profile.stores_products:
            var_ds = var_ds + slope2 * how.rvar(self.p * self.dp)
        if self.profile.splits_ds:
            parts = (self.p * (self.dp - self.delta), self.p * self.dlse, self.p * (self.dp - self.taken))
            # Of a gradient that there is none of nothing is stored, and nothing is added to the other.
            var_ds = var_ds + self.dlse.sign().abs() * slope2 * sum(how.rvar(part) for part in parts)
        if how.softcap:
            var_ds = var_ds + (self.p * (self.dp - self.taken)).square() * self._var_slope()
        if self.narrow:
            var_ds = var_ds + self.narrow.of_ds(self.ds, ds_factor(how.scale, how.softcap))
        return var_ds

    def _var_slope(self) -> torch.Tensor:
        """1 - t^2 moves with the score's own error and the tanh's."""
        steep, softcap = 1 - self.slope, self.how.softcap
        return 4 * steep * (self.slope2 * self.raw / softcap**2 + (A2 + self.profile.tanh_error**2) * steep)

    @cached_property
    def alike(self) -> torch.Tensor | None:
        """The most by which roundings of dS may agree in a row, on its way to dQ and dK."""
        found = rounded_alike(self.p, self.dp, self.taken, self.how.dtype, self.profile)
        return None if found is None else self.how.scale * self.slope * found
