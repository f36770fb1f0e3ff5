"""The whole attention layer over a packed sequence: projections, norms, rotary, attention, output projection.

Each document is computed on its own, in float64, with closed-form gradients; micro-sequences, and ranks' shares of
them, appear only as the places where a buffered implementation rounds partial sums. A leading dimension holds simulated
roundings (arithmetic.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.conventions import USUAL, Conventions
from attn_fuzz.reference.grouping import Packed, groups_of, sum_of
from attn_fuzz.reference.layout import Span, document_spans, owned_slices, rank_slices
from attn_fuzz.reference.monte_carlo import SAMPLES, Arithmetic
from attn_fuzz.reference.narrow import Narrow
from attn_fuzz.reference.part_sums import Parts, Sums
from attn_fuzz.reference.profile import ACCUMULATION, ALIKE, ROUNDING_SECOND_MOMENT, UNIT_ROUNDOFF, Profile
from attn_fuzz.reference.rounding import rounding_variance
from attn_fuzz.reference.simulated import SimulatedAttention
from attn_fuzz.reference.values import draw
from attn_fuzz.reference.weights import NORM_EPSILON, layer_weights

_FLOAT32 = ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF["fp32"] ** 2
"""Relative variance of one float32 rounding."""


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """The tensors of a layer case, in its dtype."""

    x: torch.Tensor
    """``[tokens, hidden]``"""
    dout: torch.Tensor
    """``[tokens, hidden]``"""
    weights: dict[str, torch.Tensor]


def layer_inputs(case: Case, device: torch.device | str) -> LayerInputs:
    """The tensors of a layer case."""
    x, dout = (draw(case, name, 1, case.hidden, device)[:, 0] for name in ("x", "dout"))
    return LayerInputs(x, dout, layer_weights(case, device))


def rotary_frequencies(case: Case, device: torch.device) -> torch.Tensor:
    """Angle per position of each channel pair, float64 ``[head_dim // 2]``; pair c is channels (c, c + d/2).

    ``theta ** (-2 c / head_dim)`` (Su et al., 2021); ``proportional`` leaves the pairs behind the leading
    ``rotary_fraction`` at angle 0.
    """
    pairs = case.head_dim // 2
    frequency = case.rotary_theta ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    if case.rotary == "proportional":
        frequency[math.ceil(case.rotary_fraction * pairs) :] = 0
    return frequency


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns ``[..., tokens, heads, d]``."""
    real, imaginary = x.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)


class _Layer:
    """One evaluation; every method is one stage and its gradient."""

    def __init__(
        self,
        case: Case,
        inputs: LayerInputs,
        profile: Profile,
        samples: int,
        calls: Sequence[Span] | None,
        conventions: Conventions,
    ) -> None:
        self.case, self.profile, self.conventions = case, profile, conventions
        self.by_call, self.calls = calls is not None, calls or (Span(0, case.tokens),)
        device = inputs.x.device
        self.arithmetic, self.samples = Arithmetic(case.dtype, device, case.seed, samples), samples
        self.narrow = Narrow.projecting(case.dtype, profile)
        self.weights = {name: self.arithmetic.exact(weight) for name, weight in inputs.weights.items()}
        self.spans = document_spans(case.packed_lengths)
        # Each rank's queries give K/V and parameter gradients of their own, stored as a micro-sequence's are; ranks add
        # theirs in float32 (backends/rank_layer.py), as micro-sequences do.
        self.parts = rank_slices(case)
        self.own_parts = owned_slices(case)
        # With tensor parallelism each of these numbers of heads has partial sums of its own, which are stored, too.
        self.shares = case.tensor_ranks
        if case.rotary != "none":
            self.cos, self.sin = self.rotary_tables(self.positions(device))
        self.gradients: dict[str, Expected] = {}

    # Projections.

    def project(self, x: torch.Tensor, weight: torch.Tensor, *, stored: bool = False) -> torch.Tensor:
        """``x @ weight.T``, stored or not yet; a selection of stored values needs no rounding."""
        # One product with a matrix, all samples' rows one behind another.
        y = self.multiplied(x @ weight[0].T, x, weight)
        if self.case.weights == "selection":
            return y
        squares = x[0].square() @ weight[0].square().T
        return self.arithmetic.store_sum_(y, squares) if stored else self.arithmetic.accumulate_(y, squares)

    def multiplied(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``y``, which is ``x @ weight.T``, with the roundings of its operands to the format of projections."""
        if not self.narrow:
            return y
        y = self.arithmetic.perturb(y, self.narrow.product_variance(x[0], weight[0]))
        return self.arithmetic.shrink(y, 2 * self.narrow.cut)

    def project_by_share(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A projection of the heads' channels, not yet stored: of each share of them stored, then added up."""
        if self.shares == 1:
            return self.project(x, weight)
        pairs = zip(x.chunk(self.shares, -1), weight.chunk(self.shares, -1), strict=True)
        return sum_of([self.project(*pair, stored=True) for pair in pairs])

    def project_back_by_share(self, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The gradient of a projection to the heads' channels, stored."""
        if self.shares == 1:
            return self.arithmetic.store(self.project_back(dy, weight))
        pairs = zip(dy.chunk(self.shares, -1), weight.chunk(self.shares, -2), strict=True)
        return self.arithmetic.store(sum_of([self.arithmetic.store(self.project_back(*pair)) for pair in pairs]))

    def project_back(self, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``dy @ weight``, not yet stored."""
        dx = self.multiplied(dy @ weight[0], dy, weight.transpose(-1, -2))
        return self.arithmetic.accumulate_(dx, dy[0].square() @ weight[0].square())

    def sum_over_parts(self, name: str, sums: Sums) -> None:
        """A parameter gradient: each micro-sequence's is stored, their sum is float32 unless the profile knows better.

        Nothing is computed from it, so that its own roundings need no samples: their variances are known.
        """
        # Each row by itself, whichever sequence's it is.
        rows = sums.whole.flatten(0, -2), sums.spread.flatten(0, -2)
        variance = self.arithmetic.variance_of(*rows, stored=False).view(sums.squares.shape)
        roundings = rounding_variance(sums.terms, self.case.dtype)
        variance.index_add_(0, sums.owner, roundings).add_(ACCUMULATION**2 * sums.squares)
        for call in range(len(self.calls)) if f"d_{name}" in self.profile.stored_sums else ():
            # Of the last micro-sequence, of the last two, ...: each running sum is rounded.
            running = sums.terms[sums.owner == call].flip(0).cumsum(0)[1:]
            variance[call] += rounding_variance(running, self.case.dtype).sum(0)
        self.gradients[name] = Expected(sums.whole, variance)

    def weight_gradient(self, name: str, dy: torch.Tensor, x: torch.Tensor, parts: Sequence[Span]) -> None:
        """``dy.T @ x`` of each part of the tokens, and of all of each sequence's."""
        self.sum_over_parts(name, Parts(self.calls, parts, x.device).of_products(dy, x))
        for call, rows in enumerate(self.calls) if self.narrow else ():
            assert self.narrow is not None
            expected, own = self.gradients[name], slice(*rows)
            variance = self.narrow.product_variance(dy[0, own].T, x[0, own].T)
            expected.variance[call] += variance + ALIKE * (2 * self.narrow.cut * expected.value[call]).square()

    # Norms over head channels, [..., tokens, heads, d].

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.weights:
            return x
        r = (x.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        normed = self.arithmetic.store(x * r) if self.profile.norms_in_dtype else x * r
        y = normed * self.weights[name]
        return self.arithmetic.store_sum_(y, y[0].square())

    def norm_back(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        if name not in self.weights:
            return dy
        r = (x.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        normed = x * r
        product = dy * normed
        if self.profile.norms_in_dtype:
            product = self.arithmetic.store(dy * self.arithmetic.store(normed))
        on_queries = name == "query_norm"
        parts, shares = (self.parts, self.shares) if on_queries else (self.own_parts, 1)
        self.sum_over_parts(name, Parts(self.calls, parts, x.device).of_heads(product, shares))
        g = dy * self.weights[name]
        if self.profile.norms_in_dtype:
            g = self.arithmetic.store(g)
        dx = r * (g - normed * (g * normed).mean(-1, keepdim=True))
        # The two terms may cancel; each carries float32's relative error.
        return self.arithmetic.store_sum_(dx, (r * g)[0].square())

    # Rotary.

    def positions(self, device: torch.device) -> torch.Tensor:
        """What rotary turns each token by, ``[tokens]``."""
        spans = self.calls if self.conventions.rotary_positions == "packed" else self.spans
        return torch.cat([torch.arange(span.length, device=device) for span in spans])

    def rotary_tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[samples, tokens, 1, head_dim // 2]``; queries and keys meet the same errors in them."""
        frequency = rotary_frequencies(self.case, positions.device)[None]
        if self.profile.float32_angles:
            # The exponent's rounding, times its logarithm's slope, and two roundings of the power and its reciprocal.
            relative = frequency[0].clamp_min(1e-300).log().square() + 4
            frequency = self.arithmetic.perturb(frequency, frequency[0].square() * relative * _FLOAT32)
        angles = positions.double()[:, None] * frequency[:, None]
        if self.profile.float32_angles:
            angles = self.arithmetic.perturb(angles, angles[0].square() * _FLOAT32)
        tables = angles.cos(), angles.sin()
        if self.profile.rotates_in_dtype:
            tables = self.arithmetic.store(tables[0]), self.arithmetic.store(tables[1])
        return tables[0][..., None, :], tables[1][..., None, :]

    def rotary(self, x: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
        if self.case.rotary == "none":
            return x
        y = _turned(x, self.cos, sign * self.sin)
        if self.profile.rotates_in_dtype:
            real, imaginary = x[0].chunk(2, -1)
            by_cos, by_sin = torch.cat([real, imaginary], -1), torch.cat([imaginary, real], -1)
            products = by_cos * self.cos[0].repeat(1, 1, 2), by_sin * self.sin[0].repeat(1, 1, 2)
            roundings = [rounding_variance(product, self.case.dtype) for product in products]
            y = self.arithmetic.perturb_(y, roundings[0] + roundings[1])
        # cos and sin are float32; each output mixes both channels of a pair.
        pair = x[0].square()
        mixed = pair + torch.cat(pair.chunk(2, -1)[::-1], -1)
        return self.arithmetic.store_sum_(y, mixed)

    # Padding.

    def with_computed_rows(self, x: torch.Tensor) -> torch.Tensor:
        """``[samples, tokens, ...]`` with exact zeros in rows of padding that is not computed."""
        if self.conventions.computes_padding or not self.case.padding_spans:
            return x
        x = x.clone()
        for begin, end in self.case.padding_spans:
            x[:, begin:end] = 0
        return x

    # The whole.

    def evaluate(self, inputs: LayerInputs) -> dict[str, Expected]:
        case, arithmetic = self.case, self.arithmetic
        x, dout = arithmetic.exact(inputs.x), self.with_computed_rows(arithmetic.exact(inputs.dout))
        q0 = self.project(x, self.weights["query"], stored=True).unflatten(-1, (case.heads, case.head_dim))
        kv0 = self.project(x, self.weights["key_value"], stored=True).unflatten(-1, (-1, case.head_dim))
        k0, v0 = (kv0, kv0) if case.shared_key_value else kv0.chunk(2, -2)
        q = self.rotary(self.norm("query_norm", q0))
        k = self.rotary(self.norm("key_norm", k0))
        v = self.norm("value_norm", v0)
        groups = [
            SimulatedAttention(case, self.profile, arithmetic, spans, self.parts, (q, k, v))
            for spans in groups_of(self.spans, case.heads * (1 + self.samples), x.device)
        ]
        by_token = Packed(groups, x.device)
        context = by_token([group.forward() for group in groups])
        flat = context.flatten(-2)
        out = self.project_by_share(flat, self.weights["dense"])

        self.weight_gradient("dense", dout, flat, self.parts)
        dcontext = arithmetic.store(self.project_back(dout, self.weights["dense"])).unflatten(-1, (case.heads, -1))
        dq, dk, dv = map(by_token, zip(*(group.backward(context, dcontext) for group in groups), strict=True))
        dq0 = self.norm_back("query_norm", q0, self.rotary(dq, -1.0))
        # The buffer's own slice goes back to the storage dtype before rotary and projection see it.
        dk0 = self.norm_back("key_norm", k0, self.rotary(arithmetic.store(dk), -1.0))
        dv0 = self.norm_back("value_norm", v0, arithmetic.store(dv))
        dkv0 = arithmetic.store(dk0 + dv0) if case.shared_key_value else torch.cat([dk0, dv0], -2)
        self.weight_gradient("query", dq0.flatten(-2), x, self.parts)
        self.weight_gradient("key_value", dkv0.flatten(-2), x, self.own_parts)
        dx_q = self.project_back_by_share(dq0.flatten(-2), self.weights["query"])
        dx_kv = arithmetic.store(self.project_back(dkv0.flatten(-2), self.weights["key_value"]))
        if self.conventions.gradient_rows == "consumed":
            dk, dv = map(by_token, zip(*(group.before_own() for group in groups), strict=True))
        results = {"out": (out, True), "k": (k, True), "v": (v, True), "dk": (dk, False), "dv": (dv, False)}
        results |= {"dx": (dx_q + dx_kv, True)}
        results = {name: (self.with_computed_rows(result), stored) for name, (result, stored) in results.items()}
        expected = {
            name: Expected(result[0], arithmetic.variance(result, stored=stored))
            for name, (result, stored) in results.items()
        }
        for name, of_calls in self.gradients.items():
            only = Expected(of_calls.value[0], of_calls.variance[0])
            expected[f"d_{name}"] = of_calls if self.by_call else only
        return expected


def layer_answer(
    case: Case,
    inputs: LayerInputs,
    profile: Profile,
    samples: int = SAMPLES,
    calls: Sequence[Span] | None = None,
    conventions: Conventions = USUAL,
) -> dict[str, Expected]:
    """What a layer case should give, with budgets.

    Args:
        case: a layer case.
        inputs: its tensors.
        profile: the roundings of the backend under test.
        samples: noisy evaluations behind the budgets.
        calls: the tokens of each of several sequences that the case consists of, none of which is empty; None for one.
        conventions: what the layer does otherwise than the canonical one.

    Returns:
        ``out`` and ``dx [tokens, hidden]``; the K/V buffer's ``k, v [tokens, kv_heads, head_dim]`` (keys rotated) and
        its gradients ``dk, dv``, summed over micro-sequences; ``d_<weight>`` for every parameter, and of several
        sequences one for each, ``[calls, ...]``.
    """
    return _Layer(case, inputs, profile, samples, calls, conventions).evaluate(inputs)
