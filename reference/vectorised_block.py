"""Some queries of many documents with all of their keys: one pass of vectorised.py over a block of scores."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_fuzz.reference.budget import concentrated, degrees_of_freedom
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.profile import ALIKE, Profile
from attn_fuzz.reference.rounding import flush_variance
from attn_fuzz.reference.sums import Sums, atomic_variance, walk_variance
from attn_fuzz.reference.vectorised_terms import (
    Block,
    Differences,
    Documents,
    Output,
    ScoreGradients,
    alike_of,
    differences,
    output_of,
    score_gradients,
    stacked,
)


class Keys(NamedTuple):
    """What the rows of a block put into the results of the keys, before anything is rounded to be stored."""

    dk: torch.Tensor
    """``[n, k, d]``, or of each query head ``[documents * heads, k, d]`` where those are rounded by themselves."""
    dv: torch.Tensor
    var_dk: torch.Tensor
    """``[n, k, d]``."""
    var_dv: torch.Tensor
    dk_sources: torch.Tensor
    """``[n, k]``: squares of what single rows put into the variance, summed; 0 where they are not counted."""
    dv_sources: torch.Tensor
    alike: torch.Tensor
    """``[n, k, d]``: the most that roundings of dS which agree put into dK; 0 where none do."""
    weight: torch.Tensor
    """``[n, k]``: sum of p; 0 where no narrow format needs it, and so are the queries."""
    queries: torch.Tensor
    """``[n, k, d]``: sum of p q."""


class Rows(NamedTuple):
    """Results of a block's rows, with their variances: ``[n, rows, d]``, ``lse`` ``[n, rows, 1]``."""

    values: dict[str, torch.Tensor]
    variances: dict[str, torch.Tensor]
    degrees: dict[str, torch.Tensor]


class _Queries(NamedTuple):
    """dQ."""

    dq: torch.Tensor
    stored: torch.Tensor
    variance: torch.Tensor
    by_query: torch.Tensor
    """``[n, rows, k]``: what each key puts into the variance, of squares of K."""
    seen: torch.Tensor
    """``[n, rows, d]``: what D is multiplied by."""
    alike: tuple[torch.Tensor, ...]
    """Variances of roundings that agree in a row."""


def _queries(b: Block, output: Output, d: Differences, s: ScoreGradients, alike: torch.Tensor | None) -> _Queries:
    scale, sums, narrow = b.how.scale, b.sums, b.narrow
    seen = s.pg @ b.k
    walked = walk_variance(sums.stored_dq, b.how.dtype) + atomic_variance(sums.atomic_dq, b.how.dtype)
    by_query = torch.add(s.var_ds, s.ds2, alpha=sums.over_keys + walked)
    dq = s.ds @ (scale * b.k)
    rounded = b.how.rvar(dq)
    times = sums.stored_dq + sums.atomic_dq
    stored = rounded * (1 + times) if times else rounded
    variance = (by_query @ b.k2).addcmul_(d.var_delta, seen.square()).mul_(scale**2)
    variance.addcmul_(output.shared, dq.square()).add_(stored)
    agreeing: tuple[torch.Tensor, ...] = ()
    if narrow:
        agreeing = (ALIKE * (narrow.scores_alike * dq).square(),)
        variance += scale**2 * (s.ds2 @ narrow.of_input(b.k)) + agreeing[0]
    if alike is not None:
        agreeing = (ALIKE * (alike @ b.k.abs()).square(), *agreeing)
        variance = variance + agreeing[0]
    if b.how.profile.scales_gradients:
        variance = variance + rounded
    return _Queries(dq, stored, variance, by_query, seen, agreeing)


def by_head(profile: Profile, group: int) -> bool:
    """Whether dK and dV of every query head are rounded by themselves."""
    return profile.scales_gradients or (profile.expands_kv and group > 1)


def _products(b: Block, ds: torch.Tensor, shape: torch.Size, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """dK and dV, per query head where those are rounded by themselves."""
    count, heads, queries, _ = shape
    scale, p = b.how.scale, b.found.p
    if not by_head(b.how.profile, heads // kv_heads):
        return ds.mT @ (scale * b.q), p.mT @ b.dout

    def of_heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(count * heads, queries, -1)

    return scale * (of_heads(ds).mT @ of_heads(b.q)), of_heads(p).mT @ of_heads(b.dout)


class _ByKey(NamedTuple):
    """``[n, rows, k]``: what each row puts into the variance of dK, of squares of Q, and of dV, of squares of dO."""

    dk: torch.Tensor
    dv: torch.Tensor


def _by_key(b: Block, output: Output, d: Differences, s: ScoreGradients) -> _ByKey:
    found, sums, dtype = b.found, b.sums, b.how.dtype
    over_rows = sums.over_rows + walk_variance(sums.stored, dtype)
    accumulated = output.shared + (over_rows + atomic_variance(sums.atomic_dk, dtype))
    weights = found.p2 if found.slope is None else s.pg.square()
    of_dk = s.var_ds.addcmul_(weights, d.var_delta).addcmul_(s.ds2, accumulated)
    accumulated = output.shared + (over_rows + atomic_variance(sums.atomic_dv, dtype))
    of_dv = torch.addcmul(found.w + found.rp, found.p2, accumulated)
    if not b.bounded:
        of_dv += flush_variance(found.p)
    return _ByKey(of_dk, of_dv)


def _keys(b: Block, by_key: _ByKey, ds2: torch.Tensor, alike: torch.Tensor | None) -> Keys:
    """What the rows put into the results of the keys; ``dk`` and ``dv`` themselves, and sources, are still missing."""
    scale, narrow, p = b.how.scale, b.narrow, b.found.p
    nothing = weight = queries = b.nothing
    var_dk = by_key.dk.mT @ (scale**2 * b.q2)
    var_dv = by_key.dv.mT @ b.dout2
    if narrow:
        var_dk += scale**2 * (ds2.mT @ narrow.of_input(b.q))
        var_dv += b.found.p2.mT @ narrow.of_input(b.dout)
        weight, queries = p.sum(-2), p.mT @ b.q
    agreeing = nothing if alike is None else alike.mT @ b.q.abs()
    return Keys(nothing, nothing, var_dk, var_dv, nothing, nothing, agreeing, weight, queries)


def _degrees(b: Block, output: Output, d: Differences, of_dq: _Queries) -> dict[str, torch.Tensor]:
    """Independent errors of the rows' results."""
    scale = b.how.scale
    dq_sources = (
        scale**4 * concentrated(of_dq.by_query, b.k2)
        + (d.var_delta[..., 0] * (scale**2 * of_dq.seen.square().sum(-1))).square()
        + (output.shared[..., 0] * of_dq.dq.square().sum(-1)).square()
    )
    for each in of_dq.alike:
        dq_sources = dq_sources + each.sum(-1).square()
    out_sources = concentrated(output.by_row, b.v2)
    if output.alike is not None:
        out_sources = out_sources + output.alike.sum(-1).square()
    return {
        "out": degrees_of_freedom(output.variance.sum(-1), out_sources, output.stored),
        "dq": degrees_of_freedom(of_dq.variance.sum(-1), dq_sources, of_dq.stored),
    }


def block(documents: Documents, how: Computation, sums: Sums, *, bounded: bool, degrees: bool) -> tuple[Rows, Keys]:
    """Results of some queries of every document, with all of its keys.

    Args:
        documents: those queries of them.
        how: the call computes.
        sums: how those of the call round.
        bounded: no probability can be subnormal in float32.
        degrees: whether to count independent errors.
    """
    b = stacked(documents, how, sums, bounded)
    output = output_of(b)
    d = differences(b, output)
    alike = alike_of(b, d)
    s = score_gradients(b, d)
    of_dq = _queries(b, output, d, s, alike)
    by_key = _by_key(b, output, d, s)
    dk, dv = _products(b, s.ds, documents.q.shape, documents.k.shape[1])
    keys = _keys(b, by_key, s.ds2, alike)._replace(dk=dk, dv=dv)
    if degrees:
        of_dk = how.scale**4 * concentrated(by_key.dk.mT, b.q2)
        keys = keys._replace(dk_sources=of_dk, dv_sources=concentrated(by_key.dv.mT, b.dout2))
    rows = Rows(
        {"out": output.out, "lse": b.found.lse, "dq": of_dq.dq},
        {"out": output.variance, "lse": output.lse_variance, "dq": of_dq.variance},
        _degrees(b, output, d, of_dq) if degrees else {},
    )
    return rows, keys
