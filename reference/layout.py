"""Documents, cuts and micro-sequences as ranges of tokens: plain integers, no tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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


def document_spans(lengths: Sequence[int]) -> tuple[Span, ...]:
    """Where each document lies in the packed sequence."""
    spans, begin = [], 0
    for length in lengths:
        spans.append(Span(begin, begin + length))
        begin += length
    return tuple(spans)


def cut_inside_document(lengths: Sequence[int], cuts: Sequence[int]) -> int | None:
    """The first cut that is no document boundary, or None."""
    boundaries = {span.end for span in document_spans(lengths)}
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


def segments(lengths: Sequence[int], micro_sequence: Span) -> tuple[Segment, ...]:
    """The documents that are active in a micro-sequence, with their queries and keys in packed rows.

    A document's keys reach from its own beginning to the end of its queries in this micro-sequence. Empty documents
    belong to the micro-sequence in which they stand; at the very end of the sequence, to the last one.
    """
    begin, end = micro_sequence
    total = sum(lengths)
    active = []
    for index, span in enumerate(document_spans(lengths)):
        inside = begin <= span.begin < end or span.begin == end == total
        if (span.length == 0 and inside) or (span.length and span.begin < end and span.end > begin):
            stop = min(span.end, end)
            active.append(Segment(index, Span(max(span.begin, begin), stop), Span(span.begin, stop)))
    return tuple(active)


def active_extent(lengths: Sequence[int], micro_sequence: Span) -> Span:
    """K/V rows ``[first_document_begin, end)`` that a micro-sequence may read; all others are dead to it."""
    return Span(segments(lengths, micro_sequence)[0].keys.begin, micro_sequence.end)


def call_segments(case: Arranged) -> tuple[Segment, ...]:
    """Queries and keys of every document of a kernel case."""
    queries = document_spans(case.packed_lengths)
    keys = document_spans(case.packed_key_lengths)
    return tuple(Segment(index, q, k) for index, (q, k) in enumerate(zip(queries, keys, strict=True)))
