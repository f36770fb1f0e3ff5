"""attention.py and budget.py over many documents at once, in as few passes over their scores as the formulas need.

The same formulas, term by term, held equal to the pure ones by tests. What is different is the order of work: the query
heads of a group are stacked as rows over the K/V head they share, so that K/V are not repeated and gradients come out
summed; terms with a common factor become one product; intermediate tensors are written over once no step needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.attention import Gradients
from attn_fuzz.reference.budget import degrees_of_freedom
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.narrow import ByKey
from attn_fuzz.reference.profile import ALIKE
from attn_fuzz.reference.sums import Sums
from attn_fuzz.reference.vectorised_block import Keys, Rows, block, by_head
from attn_fuzz.reference.vectorised_scores import bounded_scores
from attn_fuzz.reference.vectorised_terms import Documents

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
    documents: Documents, how: Computation, sums: Sums, *, degrees: bool, bounded: bool | None = None
) -> dict[str, Expected]:
    """Values, variances and, where asked for, degrees of freedom, by the names of ``answer.KERNEL_TENSORS``.

    Args:
        documents: padded to one size.
        how: the call computes.
        sums: how those of the call round.
        degrees: whether to count independent errors.
        bounded: no probability can be subnormal in float32; None to find out.

    Returns:
        ``[documents, heads, size, d]`` each, ``lse`` without the channels.
    """
    # fp16 has subnormals in everyday numbers; the others where probabilities are extreme.
    if bounded is None:
        bounded = bounded_scores(documents.q, documents.k, documents.k.shape[-2], how)
    blocks: list[Rows] = []
    summed: Keys | None = None
    for rows in _blocks(documents):
        dlse = None if documents.dlse is None else documents.dlse[:, :, rows]
        part = documents._replace(
            q=documents.q[:, :, rows], dout=documents.dout[:, :, rows], mask=documents.mask[:, :, rows], dlse=dlse
        )
        of_rows, of_keys = block(part, how, sums, bounded=bounded, degrees=degrees)
        blocks.append(of_rows)
        summed = of_keys if summed is None else Keys(*(x + y for x, y in zip(summed, of_keys, strict=True)))
    assert summed is not None
    return _row_results(documents, blocks) | _key_results(documents, summed, how, sums, degrees)


def _row_results(documents: Documents, blocks: Sequence[Rows]) -> dict[str, Expected]:
    """``out``, ``lse`` and ``dq``, from blocks in each of which the rows of a group are stacked."""
    count, heads = documents.q.shape[:2]

    def joined(found: Sequence[torch.Tensor]) -> torch.Tensor:
        unstacked = [x.reshape(count, heads, -1, *x.shape[2:]) for x in found]
        return torch.cat(unstacked, 2) if len(unstacked) > 1 else unstacked[0]

    results: dict[str, Expected] = {}
    for name in blocks[0].values:
        value, variance = (joined([getattr(b, kind)[name] for b in blocks]) for kind in ("values", "variances"))
        degree = joined([b.degrees[name] for b in blocks]) if name in blocks[0].degrees else None
        results[name] = Expected(value, variance, degree)
    results["lse"] = Expected(results["lse"].value[..., 0], results["lse"].variance[..., 0])
    return results


class _Stored(NamedTuple):
    """dK and dV of whole K/V heads, stored: ``[documents * kv_heads, k, d]``, sources ``[documents * kv_heads, k]``."""

    dk: torch.Tensor
    dv: torch.Tensor
    var_dk: torch.Tensor
    var_dv: torch.Tensor
    dk_sources: torch.Tensor
    stored_dk: torch.Tensor
    """Variance of the rounding of each element by itself."""
    stored_dv: torch.Tensor


def _stored(documents: Documents, keys: Keys, how: Computation, sums: Sums) -> _Stored:
    """Heads of a group added up, with the roundings of that and of storing the sums."""
    heads = documents.q.shape[1]
    count, kv_heads, size = documents.k.shape[:3]
    group, profile = heads // kv_heads, how.profile
    dk, dv, var_dk, var_dv, dk_sources = keys.dk, keys.dv, keys.var_dk, keys.var_dv, keys.dk_sources
    if keys.alike.dim():
        alike = ALIKE * keys.alike.square()
        var_dk, dk_sources = var_dk + alike, dk_sources + alike.sum(-1).square()
    times_stored = sums.stored
    if by_head(profile, group):

        def over_group(x: torch.Tensor) -> torch.Tensor:
            return x.view(count * kv_heads, group, size, x.shape[-1]).sum(1)

        stored_heads = over_group(how.rvar(dk))
        if profile.scales_gradients:
            var_dk = var_dk + stored_heads
        if profile.expands_kv and group > 1:
            times = 1 + times_stored
            var_dk, var_dv = var_dk + times * stored_heads, var_dv + times * over_group(how.rvar(dv))
            times_stored = 0
        dk, dv = over_group(dk), over_group(dv)
    stored_dk = (1 + times_stored + sums.atomic_dk) * how.rvar(dk)
    stored_dv = (1 + times_stored + sums.atomic_dv) * how.rvar(dv)
    return _Stored(dk, dv, var_dk + stored_dk, var_dv + stored_dv, dk_sources, stored_dk, stored_dv)


def _key_results(documents: Documents, keys: Keys, how: Computation, sums: Sums, degrees: bool) -> dict[str, Expected]:
    """``dk`` and ``dv``, from what all rows put into them."""
    count, kv_heads, size = documents.k.shape[:3]
    dk, dv, var_dk, var_dv, dk_sources, stored_dk, stored_dv = _stored(documents, keys, how, sums)
    dv_sources = keys.dv_sources
    if how.narrow:
        k, v = (x.reshape(count * kv_heads, size, x.shape[-1]) for x in (documents.k, documents.v))
        met = ByKey(keys.weight, keys.queries)
        alike = how.narrow.of_keys(k, v, Gradients(dk, dk, dv), met, how.scale)
        var_dk, var_dv = var_dk + alike.dk, var_dv + alike.dv
        if degrees:
            dk_sources, dv_sources = dk_sources + alike.dk_sources, dv_sources + alike.dv_sources
    results: dict[str, Expected] = {}
    for name, value, variance, sources, stored in (
        ("dk", dk, var_dk, dk_sources, stored_dk),
        ("dv", dv, var_dv, dv_sources, stored_dv),
    ):
        shape = (count, kv_heads, size)
        degree = degrees_of_freedom(variance.sum(-1), sources, stored).view(shape) if degrees else None
        results[name] = Expected(value.view(*shape, value.shape[-1]), variance.view(*shape, value.shape[-1]), degree)
    return results
