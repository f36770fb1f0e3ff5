"""The answer to a layer case whose projections are exact, from kernel answers: thousands of documents at a time.

A selection as wide as the layer permutes channels and turns signs, which no arithmetic rounds; without norms and rotary
what is left of the layer is buffer, metadata and kernel. Each micro-sequence is then one packed call over its segments,
whose budget is a formula (budget.py), and gradients of keys and values add up over the calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import Span, active_extent, active_lengths, micro_sequences
from attn_fuzz.reference.narrow import Narrow, operand_variance
from attn_fuzz.reference.profile import ACCUMULATION, ALIKE, Profile
from attn_fuzz.reference.rounding import rounding_variance
from attn_fuzz.reference.sums import Sums, sums_of

_Tensors = dict[str, torch.Tensor]

EXACT_TENSORS = ("out", "dx", "dk", "dv")


def is_exact(case: Case) -> bool:
    """Whether projections permute channels, and nothing else stands between them and the kernel."""
    return (
        case.level == "layer"
        and case.weights == "selection"
        and case.hidden == case.heads * case.head_dim
        and {case.query_norm, case.key_norm, case.value_norm, case.rotary} == {"none"}
        and not case.shared_key_value
    )


class _Inner(NamedTuple):
    """What the layer gives to attention, stored: ``[tokens, heads, d]``, and ``[tokens, kv_heads, d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def _inner(case: Case, inputs: LayerInputs, weights: Mapping[str, torch.Tensor]) -> _Inner:
    stored, shape = inputs.x.dtype, (case.tokens, case.heads, case.head_dim)
    x = inputs.x.to(weights["query"].dtype)
    q = (x @ weights["query"].T).to(stored).view(shape)
    k, v = (x @ weights["key_value"].T).to(stored).view(case.tokens, -1, case.head_dim).chunk(2, 1)
    dout = (inputs.dout.to(x.dtype) @ weights["dense"]).to(stored).view(shape)
    return _Inner(q, k, v, dout)


def _alike(case: Case, profile: Profile) -> list[list[tuple[Span, Span]]]:
    """(tokens, tokens of its documents so far) of micro-sequences; together those whose sums round equally often."""
    found: dict[Sums, list[tuple[Span, Span]]] = {}
    for part in micro_sequences(case):
        queries, keys = active_lengths(case.packed_lengths, part)
        sums = sums_of(max(queries), max(keys), profile, case.heads // case.kv_heads)
        found.setdefault(sums, []).append((part, active_extent(case.packed_lengths, part)))
    return list(found.values())


def _places(spans: Iterable[Span], device: torch.device) -> torch.Tensor:
    """The tokens of some spans, one span behind another."""
    return torch.cat([torch.arange(*span, device=device) for span in spans])


def _call(case: Case, parts: Sequence[Span]) -> Case:
    """The kernel case of micro-sequences, side by side: what each sees of a document is a document of its own."""
    queries, keys = zip(*(active_lengths(case.packed_lengths, part) for part in parts), strict=True)
    return Case(
        level="kernel",
        lengths=tuple(itertools.chain(*queries)),
        key_lengths=tuple(itertools.chain(*keys)),
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        causal=case.causal,
        window=case.window,
        scale=case.scale,
        softcap=case.softcap,
        dtype=case.dtype,
        values=case.values,
    )


Answer = Callable[[Case, Inputs, Profile], Mapping[str, Expected] | None]
"""One to a kernel case in some other way; None where it has none."""


def _attended(
    case: Case, inner: _Inner, profile: Profile, dtype: torch.dtype, answer: Answer | None
) -> tuple[_Tensors, _Tensors]:
    """(values, variances) of attention's results, those of keys and values added up over the micro-sequences."""
    names = {"out": inner.q, "dq": inner.q, "dk": inner.k, "dv": inner.v}
    values = {name: torch.zeros_like(like, dtype=dtype) for name, like in names.items()}
    variances = {name: torch.zeros_like(value) for name, value in values.items()}
    for parts in _alike(case, profile):
        rows, extents = (_places(spans, inner.q.device) for spans in zip(*parts, strict=True))
        inputs = Inputs(inner.q[rows], inner.k[extents], inner.v[extents], inner.dout[rows])
        call = _call(case, [part for part, _ in parts])
        given = None if answer is None else answer(call, inputs, profile)
        if given is None:
            given = kernel_answer(call, inputs, profile, degrees=False, dtype=dtype)
        for name, found in given.items():
            if name in values:
                place = extents if name in ("dk", "dv") else rows
                values[name].index_add_(0, place, found.value)
                variances[name].index_add_(0, place, found.variance)
    for name in ("dk", "dv"):
        # Running sums in float32, where there was anything to add.
        variances[name] += torch.where(variances[name] > 0, ACCUMULATION**2 * values[name].square(), 0.0)
    return values, variances


class _Projections(NamedTuple):
    """Of the layer, which permute channels, and round what they are given where the profile says so."""

    weights: Mapping[str, torch.Tensor]
    dtype: str
    narrow: Narrow | None

    def as_operand(self, value: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Error variance of a value that has one, and is rounded as an operand."""
        if not self.narrow:
            return variance
        rounded = operand_variance(value, self.narrow.products) + ALIKE * (self.narrow.cut * value).square()
        return variance + rounded

    def out(self, value: torch.Tensor, variance: torch.Tensor) -> Expected:
        """The layer's output: the kernel's, permuted, which rounds it no more."""
        dense = self.weights["dense"].T
        return Expected(value.flatten(1) @ dense, self.as_operand(value, variance).flatten(1) @ dense.square())

    def back(self, name: str, gradient: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A projection's share of the input gradient, stored."""
        weight = self.weights[name]
        share = gradient.flatten(1) @ weight
        variance = self.as_operand(gradient, variance).flatten(1) @ weight.square()
        return share, variance.add_(rounding_variance(share, self.dtype))


def exact_layer_answer(
    case: Case,
    inputs: LayerInputs,
    profile: Profile,
    dtype: torch.dtype = torch.float64,
    answer: Answer | None = None,
) -> dict[str, Expected]:
    """Expected ``out`` and ``dx`` (``[tokens, hidden]``), and ``dk`` and ``dv`` as the buffer holds them at last.

    Args:
        case: a layer case for which ``is_exact`` holds.
        inputs: its tensors.
        profile: the roundings of the backend's kernel.
        dtype: that it is computed in (``batched.answers``).
        answer: asked first for that to each call, in the same dtype; None for nothing.
    """
    weights = {name: weight.to(dtype) for name, weight in inputs.weights.items()}
    layer = _Projections(weights, case.dtype, Narrow.projecting(case.dtype, profile))
    values, variances = _attended(case, _inner(case, inputs, weights), profile, dtype, answer)
    key_value = torch.cat([values["dk"], values["dv"]], 1)
    key_value_variance = torch.cat([variances["dk"], variances["dv"]], 1) + rounding_variance(key_value, case.dtype)
    of_queries, query_variance = layer.back("query", values["dq"], variances["dq"])
    of_keys, key_variance = layer.back("key_value", key_value, key_value_variance)
    dx = of_queries + of_keys
    return {
        "out": layer.out(values["out"], variances["out"]),
        "dx": Expected(dx, query_variance + key_variance + rounding_variance(dx, case.dtype)),
        "dk": Expected(values["dk"], variances["dk"]),
        "dv": Expected(values["dv"], variances["dv"]),
    }
