"""attention.py and budget.py over many documents at once, in as few passes over their scores as the formulas need.

The same formulas, term by term, held equal to the pure ones by tests. What is different is the order of work: the query
heads of a group are stacked as rows over the K/V head they share, so that K/V are not repeated and gradients come out
summed; terms with a common factor become one product; intermediate tensors are written over once nobody needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.attention import Gradients
from attn_fuzz.reference.budget import (
    ALIKE,
    ROUNDING_SECOND_MOMENT,
    Sums,
    atomic_variance,
    degrees_of_freedom,
    ds_factor,
    flush_variance,
    rounded_alike,
    rounding_variance,
    stored_ds_variance,
    walk_variance,
)
from attn_fuzz.reference.narrow import ByKey, Narrow
from attn_fuzz.reference.profile import UNIT_ROUNDOFF, Profile
from attn_fuzz.reference.vectorised_scores import A2, bounded_scores, forward


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


class _Keys(NamedTuple):
    """What the rows of a block put into the results of the keys, before anything is rounded to be stored."""

    dk: torch.Tensor
    """``[n, k, d]``, or of each query head ``[documents * heads, k, d]`` where those are rounded by themselves."""
    dv: torch.Tensor
    var_dk: torch.Tensor
    """``[n, k, d]``."""
    var_dv: torch.Tensor
    dk_sources: torch.Tensor
    """``[n, k]``: squares of what single rows put into the variance, summed; 0 where nobody asked."""
    dv_sources: torch.Tensor
    alike: torch.Tensor
    """``[n, k, d]``: the most that roundings of dS which agree put into dK; 0 where none do."""
    weight: torch.Tensor
    """``[n, k]``: sum of p; 0 where no narrow format needs it, and so are the queries."""
    queries: torch.Tensor
    """``[n, k, d]``: sum of p q."""


class _Rows(NamedTuple):
    """Results of a block's rows, with their variances: ``[n, rows, d]``, ``lse`` ``[n, rows, 1]``."""

    values: dict[str, torch.Tensor]
    variances: dict[str, torch.Tensor]
    degrees: dict[str, torch.Tensor]


_CPU_SCORES: Final = 1 << 15
"""Scores of a block: a few tensors of that size lie in a processor's cache, where passing over them costs a tenth."""


def _blocks(documents: Documents) -> Iterator[slice]:
    """The queries in blocks that a processor has room for; on a GPU all at once."""
    count, heads, queries, _ = documents.q.shape
    size = queries
    if documents.q.device.type == "cpu":
        size = max(8, _CPU_SCORES // max(1, count * heads * documents.k.shape[-2]))
    for begin in range(0, max(queries, 1), max(size, 1)):
        yield slice(begin, min(begin + size, queries))


def answer(
    documents: Documents, *, scale: float, softcap: float, dtype: str, profile: Profile, degrees: bool, sums: Sums
) -> dict[str, Expected]:
    """Values, variances and, where asked for, degrees of freedom, by the names of ``answer.KERNEL_TENSORS``.

    Args:
        documents: padded to one size.
        scale: softmax scale.
        softcap: 0 for none.
        dtype: storage dtype.
        profile: how the backend computes.
        degrees: whether to count independent errors.
        sums: how those of the call round.

    Returns:
        ``[documents, heads, size, d]`` each, ``lse`` without the channels.
    """
    count, heads, _, dim = documents.q.shape
    kv_heads, keys = documents.k.shape[1:3]
    group = heads // kv_heads
    # fp16 has subnormals in everyday numbers; the others where probabilities are extreme.
    bounded = bounded_scores(documents.q, documents.k, scale, softcap)
    blocks: list[_Rows] = []
    summed: _Keys | None = None
    for rows in _blocks(documents):
        part = documents._replace(
            q=documents.q[:, :, rows], dout=documents.dout[:, :, rows], mask=documents.mask[:, :, rows]
        )
        of_rows, of_keys = _block(
            part,
            scale=scale,
            softcap=softcap,
            dtype=dtype,
            profile=profile,
            degrees=degrees,
            bounded=bounded,
            sums=sums,
        )
        blocks.append(of_rows)
        summed = of_keys if summed is None else _Keys(*(x + y for x, y in zip(summed, of_keys, strict=True)))
    assert summed is not None

    def rvar(x: torch.Tensor) -> torch.Tensor:
        return rounding_variance(x, dtype)

    dk, dv, var_dk, var_dv, dk_sources, dv_sources, alike, *met = summed
    if alike.dim():
        alike_dk = ALIKE * alike.square()
        var_dk, dk_sources = var_dk + alike_dk, dk_sources + alike_dk.sum(-1).square()
    times_stored = sums.stored
    if _by_head(profile, group):

        def over_group(x: torch.Tensor) -> torch.Tensor:
            return x.view(count * kv_heads, group, keys, dim).sum(1)

        stored_heads = over_group(rvar(dk))
        if profile.scales_gradients:
            var_dk = var_dk + stored_heads
        if profile.expands_kv and group > 1:
            by_head = 1 + times_stored
            var_dk, var_dv = var_dk + by_head * stored_heads, var_dv + by_head * over_group(rvar(dv))
            times_stored = 0
        dk, dv = over_group(dk), over_group(dv)
    stored_dk = (1 + times_stored + sums.atomic_dk) * rvar(dk)
    stored_dv = (1 + times_stored + sums.atomic_dv) * rvar(dv)
    var_dk, var_dv = var_dk + stored_dk, var_dv + stored_dv
    if narrow := Narrow.of(dtype, profile):
        k, v = (x.reshape(count * kv_heads, keys, dim) for x in (documents.k, documents.v))
        keys_alike = narrow.of_keys(k, v, Gradients(dk, dk, dv), ByKey(*met), scale)
        var_dk, var_dv = var_dk + keys_alike.dk, var_dv + keys_alike.dv
        if degrees:
            dk_sources, dv_sources = dk_sources + keys_alike.dk_sources, dv_sources + keys_alike.dv_sources
    key_values, key_variances = {"dk": dk, "dv": dv}, {"dk": var_dk, "dv": var_dv}
    key_degrees: dict[str, torch.Tensor] = {}
    if degrees:
        key_degrees = {
            "dk": degrees_of_freedom(var_dk.sum(-1), dk_sources, stored_dk),
            "dv": degrees_of_freedom(var_dv.sum(-1), dv_sources, stored_dv),
        }

    def of_rows_named(found: Sequence[torch.Tensor]) -> torch.Tensor:
        # A group's rows are stacked within each block.
        unstacked = [x.reshape(count, heads, -1, *x.shape[2:]) for x in found]
        return torch.cat(unstacked, 2) if len(unstacked) > 1 else unstacked[0]

    results: dict[str, Expected] = {}
    for name in blocks[0].values:
        value, variance = (of_rows_named([getattr(b, kind)[name] for b in blocks]) for kind in ("values", "variances"))
        degree = of_rows_named([b.degrees[name] for b in blocks]) if name in blocks[0].degrees else None
        results[name] = Expected(value, variance, degree)
    results["lse"] = Expected(results["lse"].value[..., 0], results["lse"].variance[..., 0])
    for name, value in key_values.items():
        shape = (count, kv_heads, keys)
        degree = key_degrees[name].view(shape) if degrees else None
        results[name] = Expected(value.view(*shape, dim), key_variances[name].view(*shape, dim), degree)
    return results


def _by_head(profile: Profile, group: int) -> bool:
    """Whether dK and dV of every query head are rounded by themselves."""
    return profile.scales_gradients or (profile.expands_kv and group > 1)


def _block(
    documents: Documents,
    *,
    scale: float,
    softcap: float,
    dtype: str,
    profile: Profile,
    degrees: bool,
    bounded: bool,
    sums: Sums,
) -> tuple[_Rows, _Keys]:
    """Some queries of every document, with all of its keys; arguments are those of ``answer``."""
    count, heads, queries, dim = documents.q.shape
    kv_heads, keys = documents.k.shape[1:3]
    group = heads // kv_heads
    q, dout = (x.reshape(count * kv_heads, group * queries, dim) for x in (documents.q, documents.dout))
    k, v = (x.reshape(count * kv_heads, keys, dim) for x in (documents.k, documents.v))
    plain = bounded and dtype != "fp16"
    c = ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2
    found = forward(
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
    narrow = Narrow.of(dtype, profile)
    q2, k2, v2, dout2 = q.square(), k.square(), v.square(), dout.square()

    def rvar(x: torch.Tensor) -> torch.Tensor:
        return rounding_variance(x, dtype)

    out = p @ v
    stored_out = rvar(out)
    shared = w.sum(-1, keepdim=True)
    lse = found.lse.masked_fill(found.lse.isinf(), 0.0)
    stored_lse = (A2 / 16) * lse.square()
    over_keys = sums.over_keys
    by_row = (w + rp).add_(p, alpha=over_keys)
    # sum_j w (v - o)^2, multiplied out; the difference of squares cannot go below zero by more than its own rounding,
    # which only the large errors of a tanh raise above the other terms.
    if softcap:
        spread = w @ v2 - 2 * out * (w @ v) + out.square() * shared
        var_out = torch.add(rp, p, alpha=over_keys) @ v2 + spread.clamp_min(0) + stored_out
    else:
        var_out = (by_row @ v2).add_(out * (out * shared - 2 * (w @ v))).clamp_min_(0).add_(stored_out)
    if profile.normalises_by_lse:
        var_out += stored_lse * out.square()
    alike_out: torch.Tensor | None = None
    if narrow:
        alike_out = ALIKE * (narrow.output_alike * out).square()
        var_out += p2 @ narrow.of_input(v) + alike_out
    shared = shared + stored_lse
    var_lse = shared + A2 * (1 + lse.square())
    if narrow and found.mean_score is not None:
        var_lse += narrow.of_lse(found.mean_score)

    dp = dout @ v.mT
    dp2 = dp.square()
    weighted = dout * out
    delta = weighted.sum(-1, keepdim=True)
    folded = c if plain and profile.rounds_dp else 0.0
    var_dp = torch.baddbmm(dp2, dout2, v2.mT, beta=folded, alpha=A2)
    if profile.rounds_dp and not plain:
        var_dp += rvar(dp)
    if narrow:
        var_dp += narrow.of_dp(dout, v, dp)
    var_delta = torch.zeros_like(delta)
    if profile.delta_from_output:
        var_delta = (dout2 * var_out).sum(-1, keepdim=True) + A2 * weighted.square().sum(-1, keepdim=True)
        if narrow:
            var_delta += narrow.of_delta(dout, out, delta)
    stored_products = rvar(p * dp) if profile.stores_products else None
    if profile.delta_from_probabilities:
        relative = torch.add(w, p2, alpha=A2)
        if found.stored_p is not None:
            relative += found.stored_p
        relative.mul_(dp2).addcmul_(p2, var_dp)
        if stored_products is not None:
            relative += stored_products
        var_delta = var_delta + relative.sum(-1, keepdim=True)
        var_delta += (over_keys + shared) * delta.square()
    alike = rounded_alike(p, dp, delta, dtype, profile)
    # float32 storage of D and dP - D, by p^2 as the error of dP itself.
    var_dp.add_(dp2, alpha=A2).add_(A2 * delta.square())
    difference = dp.sub_(delta)
    difference2 = torch.mul(difference, difference, out=dp2)
    by_difference = w if found.stored_p is None else w + found.stored_p
    if not bounded:
        by_difference = by_difference + flush_variance(p)
    var_ds = var_dp.mul_(p2).addcmul_(by_difference, difference2)
    if stored_products is not None:
        var_ds += stored_products
    pg = p
    if slope is None:
        ds = difference.mul_(p)
    else:
        slope2 = slope.square()
        var_ds *= slope2
        steep = 1 - slope
        var_slope = 4 * steep * (slope2 * found.raw / softcap**2 + (A2 + profile.tanh_error**2) * steep)
        var_ds.addcmul_(p2 * difference2, var_slope)
        pg = p * slope
        ds = difference.mul_(pg)
    ds2 = torch.mul(ds, ds, out=difference2)
    if plain:
        var_ds.add_(ds2, alpha=c)
    else:
        var_ds += stored_ds_variance(ds, scale, softcap, dtype)
    if narrow:
        var_ds += narrow.of_ds(ds, ds_factor(scale, softcap))

    seen = pg @ k
    walked = walk_variance(sums.stored_dq, dtype) + atomic_variance(sums.atomic_dq, dtype)
    by_query = torch.add(var_ds, ds2, alpha=over_keys + walked)
    dq = ds @ (scale * k)
    rounded_dq = rvar(dq)
    dq_times = sums.stored_dq + sums.atomic_dq
    stored_dq = rounded_dq * (1 + dq_times) if dq_times else rounded_dq
    var_dq = (by_query @ k2).addcmul_(var_delta, seen.square()).mul_(scale**2)
    var_dq.addcmul_(shared, dq.square()).add_(stored_dq)
    alike_dq_narrow: torch.Tensor | None = None
    if narrow:
        alike_dq_narrow = ALIKE * (narrow.scores_alike * dq).square()
        var_dq += scale**2 * (ds2 @ narrow.of_input(k)) + alike_dq_narrow
    over_rows = sums.over_rows + walk_variance(sums.stored, dtype)
    accumulated = shared + (over_rows + atomic_variance(sums.atomic_dk, dtype))
    by_key = var_ds.addcmul_(p2 if slope is None else pg.square(), var_delta).addcmul_(ds2, accumulated)
    by_key_dv = torch.addcmul(w + rp, p2, shared + (over_rows + atomic_variance(sums.atomic_dv, dtype)))
    if not bounded:
        by_key_dv += flush_variance(p)
    var_dk = by_key.mT @ (scale**2 * q2)
    var_dv = by_key_dv.mT @ dout2
    weight = met_queries = torch.zeros((), dtype=q.dtype, device=q.device)
    if narrow:
        var_dk += scale**2 * (ds2.mT @ narrow.of_input(q))
        var_dv += p2.mT @ narrow.of_input(dout)
        weight, met_queries = p.sum(-2), p.mT @ q
    alike_dk = alike_dq = torch.zeros((), dtype=q.dtype, device=q.device)
    if alike is not None:
        alike.mul_(scale if slope is None else scale * slope)
        alike_dk, alike_dq = alike.mT @ q.abs(), ALIKE * (alike @ k.abs()).square()
        var_dq = var_dq + alike_dq
    if profile.scales_gradients:
        var_dq = var_dq + rounded_dq
    if _by_head(profile, group):

        def of_heads(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(count * heads, queries, -1)

        dk, dv = scale * (of_heads(ds).mT @ of_heads(q)), of_heads(p).mT @ of_heads(dout)
    else:
        dk, dv = ds.mT @ (scale * q), p.mT @ dout

    counted: dict[str, torch.Tensor] = {}
    dk_sources = dv_sources = torch.zeros((), dtype=q.dtype, device=q.device)
    if degrees:
        by_channels = scale**2 * seen.square().sum(-1)
        dq_sources = (
            scale**4 * _concentrated(by_query, k2)
            + (var_delta[..., 0] * by_channels).square()
            + (shared[..., 0] * dq.square().sum(-1)).square()
        )
        if alike is not None:
            dq_sources = dq_sources + alike_dq.sum(-1).square()
        out_sources = _concentrated(by_row, v2)
        if alike_out is not None and alike_dq_narrow is not None:
            out_sources = out_sources + alike_out.sum(-1).square()
            dq_sources = dq_sources + alike_dq_narrow.sum(-1).square()
        dk_sources, dv_sources = scale**4 * _concentrated(by_key.mT, q2), _concentrated(by_key_dv.mT, dout2)
        counted = {
            "out": degrees_of_freedom(var_out.sum(-1), out_sources, stored_out),
            "dq": degrees_of_freedom(var_dq.sum(-1), dq_sources, stored_dq),
        }
    rows = _Rows({"out": out, "lse": found.lse, "dq": dq}, {"out": var_out, "lse": var_lse, "dq": var_dq}, counted)
    return rows, _Keys(dk, dv, var_dk, var_dv, dk_sources, dv_sources, alike_dk, weight, met_queries)


def _concentrated(weights: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """``sum_j (weight_ij |vector_j|^2)^2``."""
    return (weights.square() @ vectors.sum(-1, keepdim=True).square())[..., 0]
