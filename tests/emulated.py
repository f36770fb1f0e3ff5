"""Correct varlen kernels that compute otherwise than in float32, emulated on a CPU; and the same with a planted fault.

Everything is float64 but for the roundings that a kernel is about: operands of products, scores, probabilities,
exponentials, running sums of gradients. Results are stored in the dtype, as every kernel does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attn_fuzz.reference.attention import allowed_keys

Rounding = Callable[[torch.Tensor], torch.Tensor]


def exactly(x: torch.Tensor) -> torch.Tensor:
    return x


def cut_off(x: torch.Tensor) -> torch.Tensor:
    """TF32 as some hardware makes it: the 13 lowest bits of float32 are ignored."""
    return (x.float().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def to_nearest(x: torch.Tensor) -> torch.Tensor:
    """TF32 by rounding to nearest, ties away from zero, as cvt.rna does."""
    return cut_off((x.float().contiguous().view(torch.int32) + 0x1000).view(torch.float32))


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


def fp16(x: torch.Tensor) -> torch.Tensor:
    return x.half().double()


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """What rounds, and what is wrong."""

    operand: Rounding = exactly
    left: Rounding | None = None
    """Of the left operand, where it is another than of the right: registers and shared memory go separate ways."""
    score: Rounding = exactly
    weight: Rounding = exactly
    exponential: Rounding = exactly
    """Of exp(s - max) or exp(s - lse)."""
    scaled_query: Rounding = exactly
    """Of q times the scale."""
    keeps_weights: bool = False
    """P stays as it is in half precision, too."""
    keeps_ds: bool = False
    """So does dS."""
    exact_delta: bool = False
    """D is that of P and dP."""
    stored_dp: bool = False
    """dP is stored in the dtype."""
    stored_scores: bool = False
    """So are scores."""
    normalised: bool = False
    """Weights are normalised before they are rounded."""
    atomic: tuple[str, ...] = ()
    """Gradients that tiles of 16 add to in the dtype, in a shuffled order."""
    by_head: Rounding | None = None
    """Of dK and dV of every query head, before the heads of a group are added up; None: in the dtype."""
    drops: bool = False
    """The planted fault: rows of five keys or more lose their second one."""
    scale_by: float = 1.0
    """A planted fault where it is not 1."""

    def product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.left or self.operand)(x) @ self.operand(y)


@dataclasses.dataclass(frozen=True)
class _Document:
    """``[heads, rows, d]`` float64, K/V repeated over their group, and what the call asks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    scale: float
    dtype: torch.dtype
    group: int


def _scores(how: How, d: _Document) -> torch.Tensor:
    if how.scaled_query is exactly:
        raw = d.scale * how.scale_by * how.product(d.q, d.k.mT)
    else:
        raw = how.product(how.scaled_query(d.q * d.scale), d.k.mT)
    if how.stored_scores:
        raw = _stored(raw, d.dtype)
    return how.score(raw.float().double()).masked_fill(~d.mask, -torch.inf)


def _stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).double()


def _weights(how: How, scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(s - lse), 0 in rows that see nothing."""
    blind = lse == -torch.inf
    return how.exponential(torch.exp(scores - lse.masked_fill(blind, 0.0)).float().double()).masked_fill(blind, 0.0)


def _forward(how: How, d: _Document) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(how, d)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    weights = _weights(how, scores, top)
    total = weights.sum(-1, keepdim=True)
    divisor = torch.where(total == 0, 1.0, total)
    if how.normalised:
        weights, divisor = weights / divisor, torch.ones_like(divisor)
    if d.dtype != torch.float32 and not how.keeps_weights:
        weights = _stored(weights, d.dtype)
    out = how.product(how.weight(weights), d.v) / divisor
    lse = torch.where(total == 0, -torch.inf, top + torch.where(total == 0, 1.0, total).log())
    return _stored(out, d.dtype), lse.float().double()


def _summed(how: How, name: str, left: torch.Tensor, right: torch.Tensor, d: _Document, times: float) -> torch.Tensor:
    """``times * left @ right``; in the dtype, tile by tile, where that is what happens to this gradient."""
    if name not in how.atomic:
        return times * how.product(left, right)
    total = left.new_zeros(*left.shape[:-1], right.shape[-1])
    places = list(range(0, left.shape[-1], 16))
    for index in torch.randperm(len(places), generator=torch.Generator().manual_seed(len(places))).tolist():
        tile = slice(places[index], places[index] + 16)
        share = _stored(times * how.product(left[..., tile], right[..., tile, :]), d.dtype)
        total = _stored(total + share, d.dtype)
    return total


def _grouped(how: How, name: str, left: torch.Tensor, right: torch.Tensor, d: _Document, times: float) -> torch.Tensor:
    """The same per K/V head; atomic sums of a group's heads go to one place."""
    if name in how.atomic:
        left = left.unflatten(0, (-1, d.group)).transpose(1, 2).flatten(2)
        right = right.unflatten(0, (-1, d.group)).flatten(1, 2)
        return _summed(how, name, left, right, d, times)
    heads = _summed(how, name, left, right, d, times)
    heads = how.by_head(heads) if how.by_head else _stored(heads, d.dtype)
    return heads.unflatten(0, (-1, d.group)).sum(1)


def _backward(
    how: How, d: _Document, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p = _weights(how, _scores(how, d), lse)
    kept = how.weight(p if how.keeps_weights else _stored(p, d.dtype))
    dp = how.score(how.product(dout, d.v.mT).float().double())
    if how.stored_dp:
        dp = _stored(dp, d.dtype)
    delta = ((p * dp) if how.exact_delta else (dout * out)).sum(-1, keepdim=True)
    ds = how.score((kept if how.weight is not exactly else p) * (dp - delta))
    if d.dtype != torch.float32 and not how.keeps_ds:
        ds = _stored(ds, d.dtype)
    scale = d.scale * how.scale_by
    return (
        _summed(how, "dq", ds, d.k, d, scale),
        _grouped(how, "dk", ds.mT, d.q, d, scale),
        _grouped(how, "dv", kept.mT, dout, d, 1.0),
    )


class _Attention(torch.autograd.Function):
    """All documents of a call, one after another."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: How, call: tuple[Any, ...]) -> Any:
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float64)
        for rows, _, document in _documents(q, k, v, how, call):
            found, found_lse = _forward(how, document)
            out[rows] = found.transpose(0, 1).to(q.dtype)
            lse[rows] = found_lse[..., 0].T
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how, ctx.call = how, call
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, document in _documents(q, k, v, ctx.how, ctx.call):
            o, g = (x[rows].double().transpose(0, 1) for x in (out, dout))
            found = _backward(ctx.how, document, o, lse[rows].T[..., None], g)
            for result, place, value in zip((dq, dk, dv), (rows, keys, keys), found, strict=True):
                result[place] = value.transpose(0, 1).to(result.dtype)
        return dq, dk, dv, None, None


def _documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: How, call: tuple[Any, ...]) -> Any:
    bounds, key_bounds, scale, window = call
    group = q.shape[1] // k.shape[1]
    for places in zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds), strict=True):
        rows, keys = (slice(*place) for place in places)
        own, *others = (x[place].double().transpose(0, 1) for x, place in ((q, rows), (k, keys), (v, keys)))
        repeated = (x.repeat_interleave(group, 0) for x in others)
        mask = allowed_keys(own.shape[1], others[0].shape[1], window)
        if how.drops:
            long = mask.sum(-1) >= 5
            mask[long] &= mask[long].cumsum(-1) != 2
        yield rows, keys, _Document(own, *repeated, mask, scale, q.dtype, group)


def kernel(how: How, arithmetic: Mapping[str, object] | None = None) -> Callable[..., torch.Tensor]:
    """A varlen kernel that computes so, and declares this of its arithmetic."""

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        window = (window_size[0], 0) if causal else window_size
        return _Attention.apply(q, k, v, how, (cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), scale, window))

    declared: dict[str, object] = {"devices": ["cpu"]}
    if arithmetic is not None:
        declared["arithmetic"] = dict(arithmetic)
    attend.capabilities = declared  # type: ignore[attr-defined]
    return attend


ALL_SUMS = ("dq", "dk", "dv")

KINDS: dict[str, tuple[How, dict[str, Any], str]] = {
    "tf32_cut_off": (How(operand=cut_off), {"products": "tf32"}, "fp32"),
    "tf32_rounded": (How(operand=to_nearest), {"products": "tf32"}, "fp32"),
    "tf32_one_operand_each_way": (How(operand=cut_off, left=to_nearest), {"products": "tf32"}, "fp32"),
    "bf16_products": (How(operand=bf16), {"products": "bf16"}, "fp32"),
    "fp16_products": (How(operand=fp16), {"products": "fp16"}, "fp32"),
    "bf16_products_of_fp16": (How(operand=bf16), {"products": "bf16"}, "fp16"),
    "bf16_scores": (How(score=bf16), {"scores_dtype": "bf16"}, "fp32"),
    "fp16_scores": (How(score=fp16), {"scores_dtype": "fp16"}, "fp32"),
    "bf16_weights": (How(weight=bf16), {"probabilities_dtype": "bf16"}, "fp32"),
    "bf16_weights_normalised": (How(weight=bf16, normalised=True), {"probabilities_dtype": "bf16"}, "fp32"),
    "fp16_weights": (How(weight=fp16), {"probabilities_dtype": "fp16"}, "fp32"),
    "bf16_weights_of_fp16": (How(weight=bf16), {"probabilities_dtype": "bf16"}, "fp16"),
    "bf16_exponentials": (How(exponential=bf16), {"exp_error": 2.0**-8}, "fp32"),
    "bf16_exponentials_of_fp16": (How(exponential=bf16), {"exp_error": 2.0**-8}, "fp16"),
    "atomic_sums_in_bf16": (How(atomic=ALL_SUMS), {"atomic_sums": frozenset(ALL_SUMS)}, "bf16"),
    "atomic_sums_in_fp16": (How(atomic=ALL_SUMS), {"atomic_sums": frozenset(ALL_SUMS)}, "fp16"),
}
"""Kinds of arithmetic: how they are emulated, what declares them, and a dtype in which they show."""

for _name, (_how, _facts, _) in KINDS.items():
    globals()[_name] = kernel(_how)
    globals()[f"{_name}_declared"] = kernel(_how, _facts)
    globals()[f"{_name}_faulty"] = kernel(dataclasses.replace(_how, drops=True), _facts)
