"""Documents, cuts and micro-sequences as token ranges, against sets of tokens counted one by one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import (
    Segment,
    Span,
    active_extent,
    active_lengths,
    call_segments,
    cut_inside_document,
    document_spans,
    micro_sequences,
    segments,
)

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any).map(tuple)


@st.composite
def cut_cases(draw: st.DrawFn) -> Case:
    lengths = draw(LENGTHS)
    padding = draw(st.integers(0, 3))
    total = sum(lengths) + padding
    cuts = draw(st.sets(st.integers(1, total - 1), max_size=4)) if total > 1 else set()
    return Case(lengths=lengths, padding=padding, cuts=tuple(sorted(cuts)))


every_cut_case = given(case=cut_cases())
quick = settings(max_examples=50, deadline=None)


def owners(lengths: tuple[int, ...]) -> list[int]:
    """The document of every token."""
    return [document for document, length in enumerate(lengths) for _ in range(length)]


def test_by_hand() -> None:
    """Documents of 4, 1 and 10 behind a past of 7 that none of them attends to; cut again inside the last."""
    case = Case(lengths=(7, 4, 0, 1, 10), cuts=(7, 14))
    assert micro_sequences(case) == ((0, 7), (7, 14), (14, 22))
    assert [segments(case.lengths, part) for part in micro_sequences(case)] == [
        (Segment(0, Span(0, 7), Span(0, 7)),),
        (
            Segment(1, Span(7, 11), Span(7, 11)),
            Segment(2, Span(11, 11), Span(11, 11)),
            Segment(3, Span(11, 12), Span(11, 12)),
            Segment(4, Span(12, 14), Span(12, 14)),
        ),
        (Segment(4, Span(14, 22), Span(12, 22)),),
    ]
    assert [active_extent(case.lengths, part) for part in micro_sequences(case)] == [(0, 7), (7, 14), (12, 22)]


@quick
@given(lengths=LENGTHS, data=st.data())
def test_lengths_of_active_documents_are_those_of_their_segments(lengths: tuple[int, ...], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, sum(lengths) - 1))
    part = Span(begin, data.draw(st.integers(begin + 1, sum(lengths))))
    active = segments(lengths, part)
    queries, keys = active_lengths(lengths, part)
    assert queries == tuple(segment.queries.length for segment in active)
    assert keys == tuple(segment.keys.length for segment in active)


@quick
@given(lengths=LENGTHS)
def test_documents_lie_back_to_back(lengths: tuple[int, ...]) -> None:
    spans = document_spans(lengths)
    assert tuple(span.length for span in spans) == lengths
    assert spans[0].begin == 0
    assert all(span.end == after.begin for span, after in pairwise(spans))
    assert [index for index, span in enumerate(spans) for _ in range(*span)] == owners(lengths)


@quick
@every_cut_case
def test_micro_sequences_cover_every_token_once(case: Case) -> None:
    parts = micro_sequences(case)
    assert [token for part in parts for token in range(*part)] == list(range(case.tokens))
    assert all(part.length > 0 for part in parts)
    assert tuple(part.end for part in parts[:-1]) == case.cuts


@quick
@every_cut_case
def test_every_token_is_a_query_once_with_its_document_so_far_as_keys(case: Case) -> None:
    owner = owners(case.packed_lengths)
    seen: list[int] = []
    for part in micro_sequences(case):
        active = segments(case.packed_lengths, part)
        queries = [token for segment in active for token in range(*segment.queries)]
        assert queries == list(range(*part))
        seen += queries
        for segment in active:
            assert all(owner[token] == segment.document for token in range(*segment.queries))
            so_far = [token for token in range(part.end) if owner[token] == segment.document]
            assert list(range(*segment.keys)) == so_far
    assert seen == list(range(case.tokens))


@quick
@every_cut_case
def test_every_document_is_somewhere_and_an_empty_one_once(case: Case) -> None:
    active = [segment.document for part in micro_sequences(case) for segment in segments(case.packed_lengths, part)]
    assert set(active) == set(range(len(case.packed_lengths)))
    assert active == sorted(active)
    for document, length in enumerate(case.packed_lengths):
        assert length or active.count(document) == 1


@quick
@every_cut_case
def test_the_active_extent_holds_what_is_attended_to_and_no_row_more(case: Case) -> None:
    for part in micro_sequences(case):
        extent = active_extent(case.packed_lengths, part)
        keys = {token for segment in segments(case.packed_lengths, part) for token in range(*segment.keys)}
        assert keys == set(range(*extent))
        assert extent.begin <= part.begin
        assert extent.end == part.end


@quick
@every_cut_case
def test_a_cut_inside_a_document_is_found(case: Case) -> None:
    owner = owners(case.packed_lengths)
    inside = [cut for cut in case.cuts if owner[cut - 1] == owner[cut]]
    assert cut_inside_document(case.packed_lengths, case.cuts) == (inside[0] if inside else None)


@pytest.mark.parametrize(
    ("lengths", "keys", "expected"),
    [
        ((2, 3), None, [(0, (0, 2), (0, 2)), (1, (2, 5), (2, 5))]),
        ((2, 0, 1), (3, 4, 0), [(0, (0, 2), (0, 3)), (1, (2, 2), (3, 7)), (2, (2, 3), (7, 7))]),
    ],
)
def test_a_call_pairs_queries_with_their_own_keys(
    lengths: tuple[int, ...], keys: tuple[int, ...] | None, expected: list[object]
) -> None:
    assert list(call_segments(Case(level="kernel", lengths=lengths, key_lengths=keys))) == expected
