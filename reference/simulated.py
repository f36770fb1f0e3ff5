"""Attention of one document with every rounding simulated: attention.py's formulas under arithmetic.py's noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reference import attention
from reference.arithmetic import Arithmetic
from reference.budget import ROUNDING_SECOND_MOMENT, flush_variance, rounding_variance, stored_ds_variance
from reference.case import Case
from reference.layout import Span
from reference.profile import ACCUMULATION, UNIT_ROUNDOFF, Profile


class SimulatedAttention:
    """One document of a layer case; sample 0 is exact.

    Args:
        case: options and dtype.
        profile: which intermediates the backend rounds.
        arithmetic: the rounding points.
        span: where the document lies in the packed sequence.
        q: ``[samples, tokens, heads, d]``, the document's rows.
        k: ``[samples, tokens, kv_heads, d]``.
        v: as ``k``.
    """

    def __init__(
        self,
        case: Case,
        profile: Profile,
        arithmetic: Arithmetic,
        span: Span,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        self.case, self.profile, self.arithmetic, self.span = (case, profile, arithmetic, span)
        self.group = case.heads // case.kv_heads
        self.q = q.transpose(1, 2)
        self.k, self.v = (attention.expand_heads(x.transpose(1, 2), self.group) for x in (k, v))
        mask = attention.allowed_keys(span.length, span.length, case.effective_window, q.device)
        scores, self.slope = self._scores()
        probabilities, lse = attention.softmax_rows(scores, mask)
        # The float32 LSE that rows are normalised by, at least in the backward.
        finite = lse[0].masked_fill(~lse[0].isfinite(), 0.0)
        scaled = (
            probabilities * arithmetic.perturb(torch.ones_like(lse), ACCUMULATION**2 * finite.square() / 16)[..., None]
        )
        self.stored_forward = arithmetic.store(scaled if profile.normalises_by_lse else probabilities)
        # A backward recomputes scores and exponentials, and nothing normalises them again.
        recomputed = ACCUMULATION**2 * scores[0].square() / 16 + profile.exp_error**2
        self.probabilities = scaled * arithmetic.perturb(torch.ones_like(scaled), recomputed)
        self.stored = self.stored_forward if profile.normalises_by_lse else arithmetic.store(self.probabilities)

    def _scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Capped scores and their slope; forward and backward compute the same ones, errors included."""
        case, profile, arithmetic = self.case, self.profile, self.arithmetic
        scores = case.softmax_scale * (self.q @ self.k.transpose(-1, -2))
        products = case.softmax_scale**2 * (self.q[0].square() @ self.k[0].square().transpose(-1, -2))
        variance = ACCUMULATION**2 * (products + 1 + scores[0].square() / 16) + profile.exp_error**2
        if profile.scales_inputs:
            variance = variance + 2 * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[case.dtype] ** 2 * products
        if profile.rounds_scores:
            variance = variance + rounding_variance(scores[0], case.dtype)
        scores = arithmetic.perturb(scores, variance)
        if not case.softcap:
            return scores, torch.ones_like(scores)
        tanh = torch.tanh(scores / case.softcap)
        tanh = arithmetic.perturb(tanh, (profile.tanh_error**2 + ACCUMULATION**2) * tanh[0].square())
        return case.softcap * tanh, 1 - tanh.square()

    def forward(self) -> torch.Tensor:
        """Output ``[samples, tokens, heads, d]``, not yet stored."""
        out = self.stored_forward @ self.v
        squares = self.probabilities[0] @ self.v[0].square()
        return self.arithmetic.accumulate(out, squares).transpose(1, 2)

    def _ds(self, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        """Gradient of the uncapped, unscaled scores, stored."""
        profile, arithmetic = self.profile, self.arithmetic
        dp = dout @ self.v.transpose(-1, -2)
        variance = ACCUMULATION**2 * (dout[0].square() @ self.v[0].square().transpose(-1, -2))
        if profile.rounds_dp:
            variance = variance + rounding_variance(dp[0], self.case.dtype)
        dp = arithmetic.perturb(dp, variance)
        p = self.stored if profile.stores_probabilities else self.probabilities
        terms = dout * out
        delta = terms.sum(-1, keepdim=True)
        if profile.delta_from_probabilities:
            # Where a backend may take either way, the noise of both around the same exact value.
            strayed = delta - delta[:1] if profile.delta_from_output else 0.0
            delta = (p * dp).sum(-1, keepdim=True) + strayed
        delta = arithmetic.accumulate(delta, terms[0].square().sum(-1, keepdim=True))
        difference = arithmetic.accumulate(dp - delta, dp[0].square() + delta[0].square())
        p = arithmetic.perturb(p, flush_variance(p[0]))
        ds = p * difference * self.slope
        case = self.case
        return arithmetic.perturb(ds, stored_ds_variance(ds[0], case.softmax_scale, case.softcap, case.dtype))

    def backward(self, out: torch.Tensor, dout: torch.Tensor, parts: Sequence[Span]) -> tuple[torch.Tensor, ...]:
        """(dq stored, dk, dv), the latter summed over micro-sequences in float32, token-major.

        Args:
            out: stored output ``[samples, tokens, heads, d]``.
            dout: its gradient.
            parts: micro-sequences; each rounds its own share of dk and dv.
        """
        arithmetic, scale = self.arithmetic, self.case.softmax_scale
        dout = dout.transpose(1, 2)
        ds = self._ds(out.transpose(1, 2), dout)
        dq = arithmetic.accumulate(scale * (ds @ self.k), scale**2 * (ds[0].square() @ self.k[0].square()))
        if self.profile.scales_gradients:
            dq = arithmetic.store(dq)
        dk, dv = [], []
        for part in parts:
            begin, end = max(part.begin, self.span.begin), min(part.end, self.span.end)
            if begin < end:
                rows = slice(begin - self.span.begin, end - self.span.begin)
                dk.append(self._reduced(scale, ds[..., rows, :], self.q[..., rows, :], self.profile.scales_gradients))
                dv.append(self._reduced(1.0, self.stored[..., rows, :], dout[..., rows, :], False))
        sums = (self._summed(name, terms).transpose(1, 2) for name, terms in (("dk", dk), ("dv", dv)))
        return (arithmetic.store(dq).transpose(1, 2), *sums)

    def _summed(self, name: str, terms: list[torch.Tensor]) -> torch.Tensor:
        """Shares of micro-sequences added up, the last first; in the dtype where each running sum is stored in it."""
        if name not in self.profile.stored_sums:
            return sum_of(terms)
        total = terms[-1]
        for term in terms[-2::-1]:
            total = total + term
            # Adding nothing rounds nothing: earlier micro-sequences have not met later keys.
            rounding = torch.where(term[0] == 0, 0.0, rounding_variance(total[0], self.case.dtype))
            total = self.arithmetic.perturb(total, rounding)
        return total

    def _reduced(self, scale: float, weights: torch.Tensor, x: torch.Tensor, scaled_after: bool) -> torch.Tensor:
        """One part's ``scale * weights.T @ x``, per K/V head; what each rank makes of its query heads is stored."""
        arithmetic = self.arithmetic
        weights = weights.transpose(-1, -2)
        product = arithmetic.accumulate(scale * (weights @ x), scale**2 * (weights[0].square() @ x[0].square()))
        if scaled_after:
            product = arithmetic.store(product)
        if self.profile.expands_kv and self.group > 1:
            product = arithmetic.store(product)
        shares = self.case.tensor_ranks
        return attention.sum_groups(arithmetic.store(attention.sum_groups(product, self.group // shares)), shares)


def sum_of(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one tensor."""
    return torch.stack(list(terms)).sum(0)
