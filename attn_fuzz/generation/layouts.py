"""Where documents lie: Hypothesis strategies for lengths, keys and cuts, the simplest first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities

TILE_EDGES: tuple[int, ...] = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65)
"""Lengths at which kernels change their code path: one row, and either side of a tile."""

LONG_EDGES: tuple[int, ...] = (127, 128, 129, 255, 256, 257)

VERY_LONG: tuple[int, ...] = (300, 511, 512, 513, 640, 1023, 1024, 1025)
"""Drawn seldom, for what they cost: the square of them."""

LONG_LAYERS: tuple[int, ...] = (300,)
"""The same for layers, whose reference costs more: beyond the positions that bf16 can count."""

LONG_ROWS: tuple[int, ...] = (2049, 4097, 2048, 4096, 2047, 4095)
"""Queries of a document over few keys: where kernels hand their rows to further blocks, and small counters end."""

LONG_SQUARES: dict[str, tuple[int, ...]] = {"cpu": (2049, 2048, 2047), "cuda": (2049, 2048, 2047, 4097, 4096, 4095)}
"""The same over as many keys, by device: 2,049 rows take a CPU two seconds and 600 MiB, and 4,097 four times that."""

FEW_KEYS = 64
"""The most keys of so many rows: a case with them takes no longer than others do."""

PASTS: tuple[int, ...] = (
    *(191, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025),
    *(2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193),
)
"""Keys before a document's own, for few queries: where kernels split the keys of a row among several workers."""

MANY: tuple[int, ...] = (33, 65, 129, 260)
"""Documents of a call, beyond what fits into a warp or a block of threads."""

CROWD: int = (1 << 16) + 1
"""Documents of one token, in one call of hundreds: more than 16 bits count, or a grid has in two of its dimensions."""

_MAX_DRAWN_TOKENS = 700
# Kernels with an explicit mask compute all pairs of the call, across its documents too: heads * queries * keys.
MAX_PAIRS = 1 << 19
# What is done once per micro-sequence is most of the time that a case with many of them takes.
_MAX_MICRO_SEQUENCES = 24
_REGULAR_STEPS = (1, 2, 3, 4, 5, 8, 16, 32)

_IN_ALL = 48
"""Of so many layouts two have many documents, and two a very long one."""

_T = TypeVar("_T")


def among(choices: Sequence[_T]) -> st.SearchStrategy[_T]:
    """``sampled_from``, made once for the same choices: Hypothesis takes longer to make a strategy than to draw."""
    return _among(tuple(choices), tuple(map(type, choices)))


@functools.lru_cache(maxsize=4096)
def _among(choices: tuple[_T, ...], kinds: tuple[type, ...]) -> st.SearchStrategy[_T]:
    # Kinds are part of the key, because 1, 1.0 and True are equal.
    return st.sampled_from(choices)


@functools.lru_cache(maxsize=64)
def seldom(times: int) -> st.SearchStrategy[bool]:
    """True once in so many times, never in the simplest case."""
    return st.integers(0, times - 1).map(lambda number: number == times - 1)


@functools.lru_cache(maxsize=64)
def document_lengths(
    *, empty: bool, long: tuple[int, ...] = LONG_EDGES, many: tuple[int, ...] = (), very_long: tuple[int, ...] = ()
) -> st.SearchStrategy[list[int]]:
    """Lengths of documents: small ones, tile edges, one long among many tiny.

    Args:
        empty: whether a document may have no tokens.
        long: lengths of the one that is long.
        many: how many documents there are where there are many.
        very_long: lengths that are drawn seldom.
    """
    smallest = 0 if empty else 1
    small = st.integers(smallest, 9)
    edges = st.sampled_from(TILE_EDGES)
    mixed = st.lists(st.one_of(small, edges), min_size=1, max_size=5)
    tiny = st.lists(st.integers(smallest, 3), min_size=1, max_size=24)
    beside_long = st.tuples(
        st.lists(st.integers(smallest, 4), max_size=6), st.sampled_from(long), st.lists(small, max_size=3)
    ).map(lambda parts: [*parts[0], parts[1], *parts[2]])
    usual = st.one_of(mixed, tiny, beside_long).filter(lambda lengths: 1 <= sum(lengths) <= _MAX_DRAWN_TOKENS)
    kinds = [usual] * _IN_ALL
    if many:
        # A pattern over and over: hundreds of draws would make the rest of the case hard to shrink.
        pattern = st.lists(st.integers(smallest, 3), min_size=1, max_size=3).filter(any)
        repeated = st.tuples(pattern, st.sampled_from(many)).map(lambda parts: (parts[0] * parts[1])[: parts[1]])
        kinds[-4:-2] = [repeated.filter(any)] * 2
    if very_long:
        one = st.tuples(tiny, st.sampled_from(very_long)).map(lambda parts: [*parts[0][:3], parts[1]])
        kinds[-2:] = [one] * 2
    # Not one_of, which counts the branches of each instead.
    return st.integers(0, _IN_ALL - 1).flatmap(lambda kind: kinds[kind]) if many or very_long else usual


@st.composite
def cut_points(draw: st.DrawFn, lengths: Sequence[int], *, causal: bool) -> tuple[int, ...]:
    """Cuts on and beside document boundaries and anywhere else; non-causal ones on boundaries only.

    A few drawn ones, mostly; or many: on every boundary, every so many tokens as trainers cut, or a run of
    micro-sequences of one token each.
    """
    total = sum(lengths)
    if total == 1:
        return ()
    boundaries = sorted({end for end in accumulate(lengths) if 0 < end < total})
    if not causal:
        return tuple(sorted(draw(some_or_all(boundaries)))) if boundaries else ()
    beside = {cut + step for cut in (0, *boundaries, total) for step in (-1, 0, 1)}
    near = sorted(cut for cut in beside if 0 < cut < total)
    few = st.lists(st.one_of(st.sampled_from(near), st.integers(1, total - 1)), max_size=4)
    least = -(-total // _MAX_MICRO_SEQUENCES)
    steps = [step for step in _REGULAR_STEPS if least <= step < total] or [least]
    regular = st.sampled_from(steps).map(lambda step: list(range(step, total, step)))
    run = st.tuples(st.integers(1, total - 1), st.integers(2, 8)).map(
        lambda place: list(range(place[0], min(sum(place), total)))
    )
    many = [regular, run, some_or_all(boundaries).map(sorted)] if boundaries else [regular, run]
    return tuple(sorted(set(draw(st.one_of(few, few, few, *many)))))


def some_or_all(boundaries: Sequence[int]) -> st.SearchStrategy[set[int]]:
    """A few of these places, or every one of them."""
    every = st.just(set(boundaries[: _MAX_MICRO_SEQUENCES - 1]))
    return st.one_of(st.sets(st.sampled_from(boundaries), max_size=4), every)


def keys_of(draw: st.DrawFn, lengths: Sequence[int], capabilities: Capabilities, *, causal: bool) -> list[int]:
    """Keys of every document: as many as it has queries, more (a past), or fewer.

    Of many documents the first few are drawn, and the others take after them: Hypothesis gives up on cases of so many
    choices, and nearly all cases of hundreds of documents would be lost.
    """
    if causal and capabilities.causal_needs_equal_lengths:
        return list(lengths)
    fewest = [_fewest_keys(length, capabilities, causal=causal) for length in lengths]
    drawn = [draw(_key_length(*pair)) for pair in zip(lengths[:_DRAWN_KEYS], fewest[:_DRAWN_KEYS], strict=True)]
    beyond = [keys - length for keys, length in zip(drawn, lengths, strict=False)]
    return drawn + [
        max(lengths[index] + beyond[index % _DRAWN_KEYS], lengths[index] if least is None else least)
        for index, least in enumerate(fewest)
        if index >= _DRAWN_KEYS
    ]


_DRAWN_KEYS = 29
"""More than there are documents but where there are many, and no divisor of their number."""


def takes_few_keys(capabilities: Capabilities, *, causal: bool) -> bool:
    """Whether a document may have fewer keys than queries."""
    if causal and (capabilities.causal_needs_equal_lengths or not capabilities.queries_without_keys):
        return False
    return capabilities.causal if causal else capabilities.noncausal


def _fewest_keys(queries: int, capabilities: Capabilities, *, causal: bool) -> int | None:
    """The fewest keys of a document that may have fewer than it has queries, or None."""
    if capabilities.queries_without_keys:
        return 0
    return None if causal else min(1, queries)


@functools.lru_cache(maxsize=4096)
def _key_length(queries: int, fewest: int | None) -> st.SearchStrategy[int]:
    """So many keys as queries, a past more, or fewer down to ``fewest``, where that is not None."""
    choices: list[st.SearchStrategy[int]] = [st.just(queries), _PAST.map(lambda past: queries + past)]
    if fewest is not None:
        choices.append(st.integers(fewest, max(queries, fewest)))
    return st.one_of(*choices)


_PAST = st.one_of(st.integers(1, 9), st.sampled_from(TILE_EDGES))


def long_pasts(draw: st.DrawFn, lengths: Sequence[int]) -> tuple[int, int]:
    """(a document with few queries, how many keys stand before its own); (0, 0) for none, most often."""
    if draw(st.integers(0, 5)) < 5:
        return 0, 0
    short = sorted((length, index) for index, length in enumerate(lengths) if length)
    _, index = draw(among(short[:2]))
    return index, draw(among([past for past in PASTS if past * sum(lengths) <= MAX_PAIRS] or [0]))
