"""Attention of documents with every rounding simulated: attention.py's formulas under arithmetic.py's noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_fuzz.reference import attention
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.layout import Span
from attn_fuzz.reference.monte_carlo import Arithmetic
from attn_fuzz.reference.narrow import Narrow, operand_variance
from attn_fuzz.reference.profile import ACCUMULATION, ALIKE, ROUNDING_SECOND_MOMENT, UNIT_ROUNDOFF, Profile
from attn_fuzz.reference.rounding import ds_factor, flush_variance, rounded_alike, rounding_variance, stored_ds_variance
from attn_fuzz.reference.shares import Shares, product
from attn_fuzz.reference.sums import atomic_variance, sums_of, walk_variance
from attn_fuzz.reference.transfer import transferred
from attn_fuzz.reference.values import DTYPES


class _KeySum(NamedTuple):
    """A gradient of keys or values before the shares of micro-sequences are added up."""

    name: str
    scale: float
    weights: torch.Tensor
    """``[samples, documents, heads, rows, rows]``"""
    x: torch.Tensor
    """``[samples, documents, heads, rows, d]``; the gradient is ``scale * weights.T @ x``."""
    terms: torch.Tensor
    """``[shares, kv_heads, rows, d]``: what each share comes to; without samples."""
    variance: torch.Tensor
    """As ``terms``: of their errors."""


class SimulatedAttention:
    """Some documents of a layer case, side by side; sample 0 is exact.

    Tensors of its own are ``[samples, documents, heads, rows, ...]`` with as many rows as the longest document has. A
    shorter one's last rows hold anything finite: no key there is seen, and no query sees a key, so that all weights
    there are 0, and so is what comes of them.

    Args:
        case: options and dtype.
        profile: which intermediates the backend rounds.
        arithmetic: the rounding points.
        spans: where the documents lie in the packed sequence; none is empty.
        parts: micro-sequences; each rounds its own share of dk and dv.
        qkv: q ``[samples, tokens, heads, d]`` of the whole packed sequence, k and v ``[samples, tokens, kv_heads, d]``.
    """

    def __init__(
        self,
        case: Case,
        profile: Profile,
        arithmetic: Arithmetic,
        spans: Sequence[Span],
        parts: Sequence[Span],
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        q, k, v = qkv
        self.case, self.profile, self.arithmetic = case, profile, arithmetic
        self.spans, self.rows = spans, max(span.length for span in spans)
        self.group = case.heads // case.kv_heads
        self.index = transferred(
            [min(span.begin + row, span.end - 1) for span in spans for row in range(self.rows)], q.device
        )
        self.shares = Shares(spans, parts, self.rows, q.device)
        self.narrow = Narrow.of(case.dtype, profile)
        self.q = self._taken(q).contiguous()
        self.k, self.v = (attention.expand_heads(self._taken(x), self.group) for x in (k, v))
        if self.narrow:
            # Inputs of products: rounded once, and met alike by every row.
            self.q = self._operand(self.q)
            self.k, self.v = (attention.expand_heads(self._operand(self._taken(x)), self.group) for x in (k, v))
        scores, self.slope = self._scores()
        # A backward recomputes scores and exponentials, and nothing normalises them again.
        recomputed = ACCUMULATION**2 * scores[0].square() / 16 + profile.exp_error**2
        probabilities, lse = self._softmax_(scores)
        # The float32 LSE that rows are normalised by, at least in the backward.
        finite = lse[0].masked_fill(lse[0] == -torch.inf, 0.0)
        ones = torch.ones_like(lse[:1])
        scaled = probabilities * arithmetic.perturb(ones, ACCUMULATION**2 * finite.square() / 16)[..., None]
        self.rounds_p = Computation.of(case, profile).rounds_p
        self.stored_forward = self._stored(scaled if profile.normalises_by_lse else probabilities)
        if self.narrow:
            self.stored_forward = self._narrowed(self.stored_forward)
        for errors in self._rounded_alike(probabilities[0]):
            self.stored_forward = arithmetic.agree(self.stored_forward, errors)
        self.probabilities = arithmetic.perturb(torch.ones_like(scaled[:1]), recomputed).mul_(scaled)
        self.kept = self._kept(self.probabilities) if self.narrow else self.probabilities
        self.stored = self.stored_forward if profile.normalises_by_lse else self._stored(self.kept)
        if self.narrow and not profile.normalises_by_lse:
            self.stored = self._narrowed(self.stored)

    def _stored(self, p: torch.Tensor) -> torch.Tensor:
        """P as its products have it."""
        return self.arithmetic.store(p) if self.rounds_p else p

    def _operand(self, x: torch.Tensor) -> torch.Tensor:
        """An input as an operand of products."""
        assert self.narrow is not None
        rounded = self.arithmetic.perturb(x, self.narrow.of_input(x[0]))
        return self.arithmetic.shrink(rounded, self.narrow.cut)

    def _kept(self, p: torch.Tensor) -> torch.Tensor:
        """P as it is kept by what stores it in a format of its own, of exponentials that may be coarse."""
        assert self.narrow is not None
        if (stored := self.narrow.stored_weights(p[0])) is not None:
            p = self.arithmetic.perturb(p, stored)
        return self.arithmetic.agree(p, ALIKE**0.5 * self.narrow.kept_alike * p[0])

    def _narrowed(self, p: torch.Tensor) -> torch.Tensor:
        """P as an operand: rounded, cut off, and alike in a row whose weights are."""
        assert self.narrow is not None
        rounded = self.arithmetic.perturb(p, self.narrow.of_weights(p[0]))
        rounded = self.arithmetic.shrink(rounded, self.narrow.cut)
        return self.arithmetic.agree(rounded, ALIKE**0.5 * self.narrow.weights * p[0])

    def _taken(self, x: torch.Tensor) -> torch.Tensor:
        """These documents' rows of ``[samples, tokens, heads, d]``."""
        if len(self.spans) == 1:
            return x[:, None, slice(*self.spans[0])].transpose(2, 3)
        return x.index_select(1, self.index).unflatten(1, (len(self.spans), self.rows)).transpose(2, 3)

    def _mask(self, device: torch.device) -> torch.Tensor:
        """Which keys each query sees, bool ``[rows, rows]`` or ``[documents, 1, rows, rows]``."""
        mask = attention.allowed_keys(self.rows, self.rows, self.case.effective_window, device)
        if all(span.length == self.rows for span in self.spans):
            return mask
        lengths = transferred([span.length for span in self.spans], device)
        own = torch.arange(self.rows, device=device) < lengths[:, None]
        return (mask & own[:, :, None] & own[:, None, :])[:, None]

    def _scores(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Capped scores and their slope where it is not 1; forward and backward compute the same, errors included."""
        case, profile, arithmetic = self.case, self.profile, self.arithmetic
        scores = (self.q @ self.k.transpose(-1, -2)).mul_(case.softmax_scale)
        products = case.softmax_scale**2 * (self.q[0].square() @ self.k[0].square().transpose(-1, -2))
        variance = ACCUMULATION**2 * (products + 1 + scores[0].square() / 16) + profile.exp_error**2
        if profile.scales_inputs:
            variance = variance + 2 * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[case.dtype] ** 2 * products
        if profile.rounds_scores:
            variance = variance + rounding_variance(scores[0], case.dtype)
        if self.narrow and self.narrow.scores:
            variance = variance + operand_variance(scores[0], self.narrow.scores)
        scores = arithmetic.perturb_(scores, variance)
        if not case.softcap:
            return scores, None
        tanh = torch.tanh(scores / case.softcap)
        tanh = arithmetic.perturb(tanh, (profile.tanh_error**2 + ACCUMULATION**2) * tanh[0].square())
        return case.softcap * tanh, 1 - tanh.square()

    def _softmax_(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``attention.softmax_rows``, in the scores' memory: of all tensors these are among the largest."""
        masked = scores.masked_fill_(~self._mask(scores.device), -torch.inf)
        largest = masked.amax(-1, keepdim=True)
        probabilities = masked.sub_(largest.masked_fill(largest == -torch.inf, 0.0)).exp_()
        total = probabilities.sum(-1, keepdim=True)
        # At least 1, but where no key is seen.
        return probabilities.div_(total.clamp_min(1.0)), (largest + total.log()).squeeze(-1)

    def _rounded_alike(self, probabilities: torch.Tensor) -> list[torch.Tensor]:
        """What storing does to a row's weights as a whole, for each way in which they may be stored.

        Weights that lie closer together than the dtype can tell are rounded alike: that part of the output which stems
        from their differences is lost. Independent roundings would hardly show it, but keys and values are made of the
        same input, so that differences of scores go with values.
        """
        largest = probabilities.amax(-1, keepdim=True).clamp_min_(1e-300)
        relative = probabilities / largest
        found: list[torch.Tensor] = []
        forms = (*((self.case.dtype,) if self.rounds_p else ()), *(self.narrow.weight_forms if self.narrow else ()))
        for form in dict.fromkeys(forms):
            dtype = DTYPES[form]
            found.append(probabilities.to(dtype).double() - probabilities)
            if not self.profile.normalises_by_lse:
                found.append((relative.to(dtype).double() - relative) * largest)
        return found

    def forward(self) -> torch.Tensor:
        """Output, stored."""
        squares = self.probabilities[0] @ self.v[0].square()
        return self.arithmetic.store_sum_(self.stored_forward @ self.v, squares)

    def _ds(self, out: torch.Tensor, dout: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        """Gradient of the uncapped, unscaled scores, stored; ``operand`` is ``dout`` as products have it."""
        profile, arithmetic = self.profile, self.arithmetic
        dp = operand @ self.v.transpose(-1, -2)
        variance = ACCUMULATION**2 * (dout[0].square() @ self.v[0].square().transpose(-1, -2))
        if profile.rounds_dp:
            variance = variance + rounding_variance(dp[0], self.case.dtype)
        if self.narrow and self.narrow.scores:
            variance = variance + operand_variance(dp[0], self.narrow.scores)
        dp = arithmetic.perturb_(dp, variance)
        p = self.kept
        if profile.stores_probabilities:
            p = self.stored if self.rounds_p else arithmetic.store(p)
        terms = dout * out
        delta = terms.sum(-1, keepdim=True)
        if profile.delta_from_probabilities:
            summed = (p * dp).sum(-1, keepdim=True)
            # Where a backend may take either way, half of the samples take each, for the mean of both variances: their
            # noise has the same source, and added up could cancel what P itself carries of it.
            either = torch.arange(len(summed), device=dp.device)[:, None, None, None, None] % 2 == 0
            delta = torch.where(either, delta, summed) if profile.delta_from_output else summed
        delta = arithmetic.accumulate_(delta, terms[0].square().sum(-1, keepdim=True))
        difference = arithmetic.accumulate_(dp - delta, dp[0].square() + delta[0].square())
        flushed = flush_variance(p[0])
        # Next to never anywhere; a GPU would have to be waited for to know.
        if p.is_cuda or flushed.any():
            p = arithmetic.perturb(p, flushed)
        ds = p * difference
        alike = rounded_alike(p[0], dp[0], delta[0], self.case.dtype, profile)
        if profile.stores_products:
            ds = arithmetic.perturb_(ds, rounding_variance(p[0] * dp[0], self.case.dtype))
        if alike is not None:
            # All one way, or one way for the larger weights of the row and the other for the lesser ones.
            alike = ALIKE**0.5 * alike
            seen = (p[0] > 0).sum(-1, keepdim=True).clamp_min(1)
            lesser = p[0] * seen < p[0].sum(-1, keepdim=True)
            for errors in (alike, torch.where(lesser, -alike, alike)):
                ds = arithmetic.agree_(ds, errors)
        if self.slope is not None:
            ds = ds * self.slope
        case = self.case
        if Computation.of(case, profile).rounds_ds:
            ds = arithmetic.perturb_(ds, stored_ds_variance(ds[0], case.softmax_scale, case.softcap, case.dtype))
        if self.narrow:
            ds = arithmetic.perturb_(ds, self.narrow.of_ds(ds[0], ds_factor(case.softmax_scale, case.softcap)))
            ds = arithmetic.shrink(ds, self.narrow.cut)
        return ds

    def backward(self, out: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq stored, dk, dv), the latter per K/V head and summed over micro-sequences in float32.

        Args:
            out: stored output ``[samples, tokens, heads, d]``, the whole packed sequence.
            dout: its gradient.
        """
        arithmetic, scale = self.arithmetic, self.case.softmax_scale
        dout = self._taken(dout).contiguous()
        operand = self._operand(dout) if self.narrow else dout
        ds = self._ds(self._taken(out), dout, operand)
        squares = scale**2 * (ds[0].square() @ self.k[0].square())
        dq = (ds @ self.k).mul_(scale)
        sums = sums_of(self.rows, self.rows, self.profile, self.group)
        walks = walk_variance(sums.stored_dq, self.case.dtype) + atomic_variance(sums.atomic_dq, self.case.dtype)
        # How often it is stored: as a running sum, before it is scaled, and in the end.
        times = sums.stored_dq + sums.atomic_dq + self.profile.scales_gradients + 1
        dq = arithmetic.perturb_(dq, (ACCUMULATION**2 + walks) * squares + times * arithmetic.rounding(dq))
        self.key_sums = [
            self._key_sum("dk", scale, ds, self.q, self.profile.scales_gradients, sums.atomic_dk),
            self._key_sum("dv", 1.0, self.stored, operand, False, sums.atomic_dv),
        ]
        dk, dv = (self._added(of_keys, before_own=False) for of_keys in self.key_sums)
        return dq, dk, dv

    def before_own(self) -> list[torch.Tensor]:
        """(dk, dv) as they are when each key's own micro-sequence begins its backward, after ``backward``.

        What is left out is the share of the queries beside the key; those before it have not seen it.
        """
        return [self._added(of_keys, before_own=True) for of_keys in self.key_sums]

    def _key_sum(
        self, name: str, scale: float, weights: torch.Tensor, x: torch.Tensor, scaled_after: bool, atomic: int
    ) -> _KeySum:
        """``scale * weights.T @ x``, per K/V head; what each rank makes of its query heads in a share is stored.

        Errors of sums are sums of errors: what each step does is added up, and met once.

        Args:
            name: of the gradient.
            scale: of it.
            weights: ``[samples, documents, heads, rows, rows]``.
            x: ``[samples, documents, heads, rows, d]``.
            scaled_after: whether it is stored before it is scaled.
            atomic: how often the query heads of a group add to it in the dtype.
        """
        dtype, ranks = self.case.dtype, self.case.tensor_ranks
        times = sums_of(self.rows, self.rows, self.profile).stored
        walks = ACCUMULATION**2 + walk_variance(times, dtype) + atomic_variance(atomic, dtype)
        variance = self.shares.products(weights[0].square(), x[0].square()).mul_(scale**2 * walks)
        terms = self.shares.products(weights[0], x[0]).mul_(scale)
        if stored := times + scaled_after + (self.profile.expands_kv and self.group > 1):
            variance += stored * rounding_variance(terms, dtype)
        # The query heads of a group, or a rank's of them.
        together = self.group // ranks
        terms = attention.sum_groups(terms, together)
        variance = attention.sum_groups(variance, together) + (atomic + 1) * rounding_variance(terms, dtype)
        of_ranks = (attention.sum_groups(each, ranks) for each in (terms, variance))
        return _KeySum(name, scale, weights, x, *of_ranks)

    def _added(self, of_keys: _KeySum, *, before_own: bool) -> torch.Tensor:
        """``[samples, documents, kv_heads, rows, d]``: shares of micro-sequences added up, the last first."""
        name, scale, weights, x, terms, variance = of_keys
        if before_own:
            own = self.shares.own[:, None, :, None]
            terms, variance = terms.masked_fill(own, 0.0), variance.masked_fill(own, 0.0)
            weights = weights.masked_fill(self.shares.beside[:, None], 0.0)
        errors = self.shares.added(variance)
        if name in self.profile.stored_sums and not self.shares.whole:
            errors = errors + self.shares.stored_variance(terms, self.case.dtype)
        return self.arithmetic.perturb_(product(weights, x, self.group).mul_(scale), errors)
