"""Documents, cuts and micro-sequences as ranges of tokens: plain integers, no tensors."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol


class Arranged(Protocol):
    """What layouts need to know of a case (``reference/case.py`` says what each means)."""

    @property
    def cuts(self) -> tuple[int, ...]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def all_ranks(self) -> int: ...
    @property
    def packed_lengths(self) -> tuple[int, ...]: ...
    @property
    def packed_key_lengths(self) -> tuple[int, ...]: ...


class Span(NamedTuple):
    """Rows ``[begin, end)``."""

    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


class Segment(NamedTuple):
    """The part of one document that one call works on."""

    document: int
    """Index in the packed sequence; padding is the last document."""
    queries: Span
    """Rows of the query tensor."""
    keys: Span
    """Rows of the key tensor."""


@functools.lru_cache(maxsize=16)
def borders(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Where each document begins, and where the last one ends."""
    return tuple(itertools.accumulate(lengths, initial=0))


def document_spans(lengths: Sequence[int]) -> tuple[Span, ...]:
    """Where each document lies in the packed sequence."""
    return tuple(map(Span._make, itertools.pairwise(borders(tuple(lengths)))))


def cut_inside_document(lengths: Sequence[int], cuts: Sequence[int]) -> int | None:
    """The first cut that is no document boundary, or None."""
    boundaries = set(borders(tuple(lengths))[1:])
    return next((cut for cut in cuts if cut not in boundaries), None)


def micro_sequences(case: Arranged) -> tuple[Span, ...]:
    """The micro-sequences of a layer case, in forward order."""
    bounds = (0, *case.cuts, case.tokens)
    return tuple(Span(begin, end) for begin, end in itertools.pairwise(bounds))


def rank_slice(micro_sequence: Span, rank: int, ranks: int) -> Span:
    """The tokens of a micro-sequence whose queries a rank holds: equal shares, in the order of the ranks."""
    size = micro_sequence.length // ranks
    return Span(micro_sequence.begin + rank * size, micro_sequence.begin + (rank + 1) * size)


def rank_slices(case: Arranged) -> tuple[Span, ...]:
    """Every rank's share of every micro-sequence, in the order of tokens; with one rank, the micro-sequences."""
    return tuple(rank_slice(part, rank, case.ranks) for part in micro_sequences(case) for rank in range(case.ranks))


def owned_slices(case: Arranged) -> tuple[Span, ...]:
    """Every process's own tokens of every micro-sequence; without tensor parallelism, the same as ``rank_slices``."""
    return tuple(
        rank_slice(part, rank, case.all_ranks) for part in micro_sequences(case) for rank in range(case.all_ranks)
    )


def meeting(span: Span, parts: Sequence[Span]) -> Sequence[Span]:
    """Those of some spans, one beginning where another ends, that have rows in common with another one, not empty."""
    first = bisect.bisect_right(parts, span.begin, key=lambda part: part.end)
    return parts[first : bisect.bisect_left(parts, span.end, key=lambda part: part.begin)]


def parts_of(wholes: Sequence[Span], parts: Sequence[Span]) -> list[list[Span]]:
    """Those of some rising spans that lie in each of others, between which they do not reach across a border."""
    ends = [whole.end for whole in wholes]
    found: list[list[Span]] = [[] for _ in wholes]
    for part in parts:
        found[bisect.bisect_left(ends, part.end)].append(part)
    return found


def segments(lengths: Sequence[int], micro_sequence: Span) -> tuple[Segment, ...]:
    """The documents that are active in a micro-sequence, with their queries and keys in packed rows.

    A document's keys reach from its own beginning to the end of its queries in this micro-sequence. Empty documents
    belong to the micro-sequence in which they stand; at the very end of the sequence, to the last one.
    """
    return tuple(_active(tuple(lengths), *micro_sequence))


def _active(lengths: tuple[int, ...], begin: int, end: int) -> Iterator[Segment]:
    """``segments``, in order."""
    bounds = borders(lengths)
    for index in _active_documents(lengths, begin, end):
        start, stop = bounds[index], min(bounds[index + 1], end)
        yield Segment(index, Span(max(start, begin), stop), Span(start, stop))


def _active_documents(lengths: tuple[int, ...], begin: int, end: int) -> range:
    """Places of the documents of ``segments``, found without a look at the others, of which there may be thousands."""
    bounds = borders(lengths)
    # The first that stands where the micro-sequence begins, be it empty, or the one that it begins within.
    first = min(bisect.bisect_right(bounds, begin) - 1, bisect.bisect_left(bounds, begin))
    return range(first, len(lengths) if end == bounds[-1] else bisect.bisect_left(bounds, end))


def active_lengths(lengths: Sequence[int], micro_sequence: Span) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of the documents of ``segments``: only the first and the last can be cut."""
    lengths, (begin, end) = tuple(lengths), micro_sequence
    bounds, active = borders(lengths), _active_documents(lengths, begin, end)
    keys = [*lengths[active.start : active.stop]]
    keys[-1] = min(bounds[active.stop], end) - bounds[active.stop - 1]
    queries = [keys[0] - max(begin - bounds[active.start], 0), *keys[1:]]
    return tuple(queries), tuple(keys)


def active_extent(lengths: Sequence[int], micro_sequence: Span) -> Span:
    """K/V rows ``[first_document_begin, end)`` that a micro-sequence may read; all others are dead to it."""
    return Span(next(_active(tuple(lengths), *micro_sequence)).keys.begin, micro_sequence.end)


def call_segments(case: Arranged) -> tuple[Segment, ...]:
    """Queries and keys of every document of a kernel case."""
    queries = document_spans(case.packed_lengths)
    keys = document_spans(case.packed_key_lengths)
    return tuple(Segment(index, q, k) for index, (q, k) in enumerate(zip(queries, keys, strict=True)))
