"""Metadata against a computation token by token, in which every token knows its document."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends.metadata import MicroSequenceMetadata, VarlenMetadata, prefix_sums, preprocess
from attn_fuzz.reference.layout import Span, active_extent, segments

CPU = torch.device("cpu")
lengths_strategy = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)
bounded = settings(deadline=None, max_examples=50)


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(lengths, begin, end) of a micro-sequence anywhere in a packed sequence."""
    lengths = draw(lengths_strategy)
    begin = draw(st.integers(0, sum(lengths) - 1))
    return lengths, begin, draw(st.integers(begin + 1, sum(lengths)))


@dataclasses.dataclass
class BruteForce:
    """What a micro-sequence sees, found by looking at one token after another."""

    lengths: list[int]
    begin: int
    end: int

    def __post_init__(self) -> None:
        self.owner = [index for index, length in enumerate(self.lengths) for _ in range(length)]
        self.position = [position for length in self.lengths for position in range(length)]
        in_window = set(self.owner[self.begin : self.end])
        self.active = [index for index in range(len(self.lengths)) if index in in_window or self.is_empty_here(index)]

    def is_empty_here(self, index: int) -> bool:
        """An empty document stands in front of the token that follows it; the last ones behind the last token."""
        place = sum(self.lengths[:index])
        return self.lengths[index] == 0 and (
            place in range(self.begin, self.end) or place == self.end == len(self.owner)
        )

    @property
    def first_document_begin(self) -> int:
        tokens = [token for token, owner in enumerate(self.owner) if owner in self.active]
        return min(tokens)

    def lengths_of(self, tokens: range) -> tuple[int, ...]:
        return tuple(sum(self.owner[token] == index for token in tokens) for index in self.active)

    @property
    def lengths_q(self) -> tuple[int, ...]:
        return self.lengths_of(range(self.begin, self.end))

    @property
    def lengths_k(self) -> tuple[int, ...]:
        return self.lengths_of(range(self.end))

    def index_of(self, tokens: range) -> list[int]:
        return [1 + self.active.index(self.owner[token]) for token in tokens]


def metadata_of(window: tuple[list[int], int, int]) -> MicroSequenceMetadata:
    lengths, begin, end = window
    return preprocess(lengths, begin, end, causal=True, device=CPU)


@bounded
@given(windows())
def test_lengths_are_cropped_to_the_window(window: tuple[list[int], int, int]) -> None:
    varlen, expected = metadata_of(window).varlen, BruteForce(*window)
    assert varlen.lengths_q == expected.lengths_q
    assert varlen.lengths_k == expected.lengths_k


@bounded
@given(windows())
def test_first_document_begin_is_the_first_active_token(window: tuple[list[int], int, int]) -> None:
    assert metadata_of(window).first_document_begin == BruteForce(*window).first_document_begin


@bounded
@given(windows())
def test_begin_end_and_past_length_are_the_window(window: tuple[list[int], int, int]) -> None:
    metadata = metadata_of(window)
    assert (metadata.begin, metadata.end, metadata.past_length) == (window[1], window[2], window[1])


@bounded
@given(windows())
def test_prefix_sums_are_canonical(window: tuple[list[int], int, int]) -> None:
    metadata = metadata_of(window)
    for sums, lengths, rows in (
        (metadata.varlen.cu_seqlens_q, metadata.varlen.lengths_q, metadata.end - metadata.begin),
        (metadata.varlen.cu_seqlens_k, metadata.varlen.lengths_k, metadata.end - metadata.first_document_begin),
    ):
        assert sums.dtype == torch.int32
        assert sums.tolist() == [sum(lengths[:count]) for count in range(len(lengths) + 1)]
        assert sums[-1] == rows


@bounded
@given(windows())
def test_document_index_counts_active_documents_from_1(window: tuple[list[int], int, int]) -> None:
    metadata, expected = metadata_of(window), BruteForce(*window)
    varlen = metadata.varlen
    assert varlen.document_index_q.dtype == varlen.document_index_k.dtype == torch.int32
    assert varlen.document_index_q.tolist() == expected.index_of(range(metadata.begin, metadata.end))
    assert varlen.document_index_k.tolist() == expected.index_of(range(metadata.first_document_begin, metadata.end))


@bounded
@given(windows())
def test_position_index_is_the_position_within_the_document(window: tuple[list[int], int, int]) -> None:
    position_index = metadata_of(window).position_index
    assert position_index.dtype == torch.int32
    assert position_index.tolist() == BruteForce(*window).position[window[1] : window[2]]


@bounded
@given(windows())
def test_extreme_lengths_are_those_of_cropped_documents(window: tuple[list[int], int, int]) -> None:
    varlen, expected = metadata_of(window).varlen, BruteForce(*window)
    assert (varlen.min_seqlen_q, varlen.max_seqlen_q) == (min(expected.lengths_q), max(expected.lengths_q))
    assert (varlen.min_seqlen_k, varlen.max_seqlen_k) == (min(expected.lengths_k), max(expected.lengths_k))


@bounded
@given(windows())
def test_straddling_means_that_some_key_precedes_the_window(window: tuple[list[int], int, int]) -> None:
    metadata = metadata_of(window)
    assert metadata.varlen.straddling == (metadata.first_document_begin < metadata.past_length)


@bounded
@given(windows())
def test_agrees_with_the_reference_layout(window: tuple[list[int], int, int]) -> None:
    lengths, begin, end = window
    metadata, part = metadata_of(window), Span(begin, end)
    active = segments(lengths, part)
    assert metadata.varlen.lengths_q == tuple(segment.queries.length for segment in active)
    assert metadata.varlen.lengths_k == tuple(segment.keys.length for segment in active)
    assert (metadata.first_document_begin, metadata.end) == active_extent(lengths, part)


@bounded
@given(lengths_strategy, st.data())
def test_every_empty_document_is_seen_exactly_once(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=3))) if total > 1 else []
    bounds = [0, *cuts, total]
    seen = [metadata_of((lengths, *part)).varlen.lengths_k for part in zip(bounds, bounds[1:], strict=False)]
    assert sum(part.count(0) for part in seen) == lengths.count(0)


def test_issue_layout() -> None:
    """The layout that the project grew out of: lengths [4, 1, 10] with a past of 7."""
    metadata = preprocess([4, 1, 10], 7, 15, causal=True, device=CPU)
    assert metadata.first_document_begin == 5
    assert metadata.varlen.cu_seqlens_q.tolist() == [0, 8]
    assert metadata.varlen.cu_seqlens_k.tolist() == [0, 10]
    assert metadata.position_index.tolist() == list(range(2, 10))


@bounded
@given(windows())
def test_tensors_of_one_transfer_are_those_made_one_by_one(window: tuple[list[int], int, int]) -> None:
    made = metadata_of(window)
    together = made.transferred()
    named = {
        "q": (made.varlen.cu_seqlens_q, together.varlen.cu_seqlens_q),
        "k": (made.varlen.cu_seqlens_k, together.varlen.cu_seqlens_k),
        "positions": (made.position_index, together.position_index),
    }
    for one, part in named.values():
        assert torch.equal(one, part)
        assert one.dtype == part.dtype == torch.int32
        assert part.storage_offset() % 32 == 0
    assert len({part.untyped_storage().data_ptr() for _, part in named.values()}) == 1
    assert (together.past_length, together.varlen) == (made.past_length, made.varlen)


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (0, 0), (2, 2), (3, 2), (0, 6), (5, 6), (7, 9)])
def test_windows_outside_the_sequence_are_errors(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"\[{begin}, {end}\).* 5 tokens"):
        preprocess([2, 3], begin, end, causal=True, device=CPU)


@bounded
@given(windows())
def test_noncausal_windows_must_end_where_a_document_ends(window: tuple[list[int], int, int]) -> None:
    lengths, begin, end = window
    owner = BruteForce(*window).owner
    if end < len(owner) and owner[end - 1] == owner[end]:
        with pytest.raises(ValueError, match="non-causal"):
            preprocess(lengths, begin, end, causal=False, device=CPU)
    else:
        noncausal = preprocess(lengths, begin, end, causal=False, device=CPU)
        assert noncausal.varlen.lengths_k == metadata_of(window).varlen.lengths_k


@bounded
@given(st.lists(st.integers(0, 9), max_size=6), st.sampled_from([0, 3]))
def test_prefix_sums(lengths: list[int], first: int) -> None:
    sums = prefix_sums(lengths, CPU, first)
    assert sums.dtype == torch.int32
    assert sums.tolist() == [first + sum(lengths[:count]) for count in range(len(lengths) + 1)]


pairs_strategy = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=5)
sides = st.sampled_from([-1, 0, 1, 2, 5])


def varlen(pairs: list[tuple[int, int]], first_key_row: int = 0) -> VarlenMetadata:
    lengths_q, lengths_k = zip(*pairs, strict=True)
    return VarlenMetadata(lengths_q=lengths_q, lengths_k=lengths_k, device=CPU, first_key_row=first_key_row)


def sees(query: int, key: int, pair: tuple[int, int], window: tuple[int, int]) -> bool:
    """Bottom-right: the last query stands at the last key."""
    offset = key - (query + pair[1] - pair[0])
    left, right = window
    return (left < 0 or -offset <= left) and (right < 0 or offset <= right)


def brute_force_mask(pairs: list[tuple[int, int]], window: tuple[int, int], first_key_row: int) -> list[list[bool]]:
    keys = [(document, key) for document, (_, count) in enumerate(pairs) for key in range(count)]
    return [
        [False] * first_key_row + [owner == document and sees(query, key, pair, window) for owner, key in keys]
        for document, pair in enumerate(pairs)
        for query in range(pair[0])
    ]


@bounded
@given(pairs_strategy, st.tuples(sides, sides), st.sampled_from([0, 0, 1, 4]))
def test_allowed_is_the_bottom_right_mask(
    pairs: list[tuple[int, int]], window: tuple[int, int], first_key_row: int
) -> None:
    metadata = varlen(pairs, first_key_row)
    expected = torch.tensor(brute_force_mask(pairs, window, first_key_row), dtype=torch.bool)
    shape = (sum(metadata.lengths_q), first_key_row + sum(metadata.lengths_k))
    assert torch.equal(metadata.allowed(window), expected.reshape(shape))


@bounded
@given(pairs_strategy, st.integers(0, 4))
def test_first_key_row_shifts_only_the_key_side(pairs: list[tuple[int, int]], first_key_row: int) -> None:
    shifted, canonical = varlen(pairs, first_key_row), varlen(pairs)
    assert torch.equal(shifted.cu_seqlens_k, canonical.cu_seqlens_k + first_key_row)
    assert torch.equal(shifted.cu_seqlens_q, canonical.cu_seqlens_q)
    assert shifted.document_index_k.tolist() == [0] * first_key_row + canonical.document_index_k.tolist()


@bounded
@given(windows(), st.tuples(sides, sides))
def test_allowed_of_a_micro_sequence_is_a_crop_of_the_whole_sequence(
    window: tuple[list[int], int, int], bounds: tuple[int, int]
) -> None:
    """A query sees the same tokens wherever the sequence is cut, as long as it sees none behind the cut."""
    causal = (bounds[0], 0)
    metadata = metadata_of(window)
    whole = preprocess(window[0], 0, sum(window[0]), causal=True, device=CPU).varlen.allowed(causal)
    extent = slice(metadata.first_document_begin, metadata.end)
    assert torch.equal(metadata.varlen.allowed(causal), whole[metadata.begin : metadata.end, extent])
