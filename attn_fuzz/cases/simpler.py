"""Simpler options: steps that a shrinker takes towards few heads and channels, and everything at its default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attn_fuzz.cases.order import SIMPLEST, place
from attn_fuzz.cases.repair import changed
from attn_fuzz.cases.smaller import below
from attn_fuzz.reference.case import Case


def _fewer_heads(case: Case) -> Iterator[tuple[int, int]]:
    """(heads, kv_heads) to try: few, one of both factors, all around a single K/V head, then fewer of either factor."""
    kv_heads, group = case.kv_heads, case.heads // case.kv_heads
    yield from ((1, 1), (2, 1), (2, 2), (group, 1), (kv_heads, kv_heads), (case.heads, 1))
    for fewer in below(group)[1:]:
        yield fewer * kv_heads, kv_heads
    for fewer in below(kv_heads)[1:]:
        yield fewer * group, fewer


_MANY_CHANNELS: Final = 64


def _fewer_channels(dim: int) -> list[int]:
    """Powers of two and the half; of many channels multiples of 8, too, and any number in a search for the fewest."""
    fine = ((dim - 1) // 8 * 8, *below(dim)) if dim > _MANY_CHANNELS else ()
    steps = (*(1 << power for power in range(7)), dim // 2, *fine)
    return [fewer for fewer in dict.fromkeys(steps) if 0 < fewer < dim]


def narrower(case: Case) -> Iterator[Case | None]:
    """With fewer heads or channels: what every later attempt costs less for."""
    for heads, kv_heads in _fewer_heads(case):
        if (heads, kv_heads) < (case.heads, case.kv_heads):
            yield changed(case, heads=heads, kv_heads=kv_heads)
    for field, dim in (("head_dim", case.head_dim), ("head_dim_v", case.head_dim_v or 0)):
        if field == "head_dim" and case.head_dim_v is not None:
            yield changed(case, head_dim_v=None)
            yield changed(case, head_dim=case.head_dim_v, head_dim_v=None)
        for fewer in _fewer_channels(dim):
            yield changed(case, **{field: fewer})
    if case.level == "layer":
        for hidden in (1, 2, 4, 8, case.hidden // 2):
            if 0 < hidden < case.hidden:
                yield changed(case, hidden=hidden)


def simpler_options(case: Case) -> Iterator[Case | None]:
    """With one option at a simpler value."""
    for padding in below(case.padding):
        yield changed(case, padding=padding, cuts=tuple(c for c in case.cuts if c < sum(case.lengths) + padding))
    if case.padding and case.document_ids is None and case.all_ranks == 1:
        yield changed(case, lengths=(*case.lengths, case.padding), padding=0)
    if case.all_ranks > 1 and case.padding:
        yield changed(case, lengths=(*case.lengths[:-1], case.lengths[-1] + case.padding), padding=0)
    for left_out in case.padding_ids:
        yield changed(case, padding_ids=tuple(name for name in case.padding_ids if name != left_out))
    if case.padding_ids and case.document_ids is not None:
        places = tuple(place for place, name in enumerate(case.document_ids) if name in case.padding_ids)
        yield changed(case, document_ids=None, padding_ids=places)
    for capacity in below(case.capacity):
        yield changed(case, capacity=capacity)
    for field, choices in SIMPLEST.items():
        if field == "key_lengths" and sum(case.lengths) > sum(case.packed_key_lengths):
            # As many keys as queries would be more than there are.
            continue
        for choice in choices[: place(field, getattr(case, field))]:
            yield changed(case, **{field: choice})
    for field in ("loose_max_seqlen", "gaps"):
        queries, keys = getattr(case, field)
        yield from (changed(case, **{field: (fewer, keys)}) for fewer in below(queries))
        yield from (changed(case, **{field: (queries, fewer)}) for fewer in below(keys))
    for side in (0, 1):
        for width in below(case.window[side]):
            yield changed(case, window=(width, case.window[1]) if side == 0 else (case.window[0], width))
