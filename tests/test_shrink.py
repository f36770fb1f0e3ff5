"""Shrinking: what comes out still fails, is no larger, and nothing can be taken from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.cases.order import simplicity
from attn_fuzz.cases.smaller import (
    fewer_documents,
    merged_documents,
    one_shorter,
    shorter_documents,
    shorter_micro_sequences,
    simpler_cuts,
    tiny_layouts,
)
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.strategies import cases, straddling
from attn_fuzz.reduction.minimise import PASSES, minimise
from attn_fuzz.reference.case import LEVELS, Case
from attn_fuzz.reference.values import draw

DOMAIN = Domain.of(Capabilities(), "cpu")
DRAWN = st.one_of(*(cases(level, DOMAIN) for level in LEVELS))
KERNEL = Case(level="kernel", lengths=(3, 0, 4), key_lengths=(3, 2, 6), document_ids=(7, 5, 6))
LAYER = Case(lengths=(4, 1, 10), cuts=(2, 7), padding=3)

Pass = Callable[[Case], Iterator[Case | None]]


def candidates(step: Pass, case: Case) -> list[Case]:
    return [candidate for candidate in step(case) if candidate is not None]


def layouts(step: Pass, case: Case) -> set[tuple[object, ...]]:
    """What a pass offers, without what it leaves alone."""
    return {(c.lengths, c.key_lengths, c.cuts, c.packed_ids[: len(c.lengths)]) for c in candidates(step, case)}


# The passes, one by one.


def test_documents_go_alone_and_in_runs_and_keep_their_names() -> None:
    assert layouts(fewer_documents, KERNEL) == {
        ((0, 4), (2, 6), (), (5, 6)),
        ((3, 4), (3, 6), (), (7, 6)),
        ((3, 0), (3, 2), (), (7, 5)),
    }
    four = Case(level="kernel", lengths=(1, 2, 3, 4))
    assert {c.lengths for c in candidates(fewer_documents, four)} >= {(1, 2), (3, 4), (2, 3, 4), (1, 2, 3)}


def test_two_documents_go_wherever_they_stand_so_that_every_other_one_stays_what_it_is() -> None:
    case = Case(level="kernel", lengths=(1, 0, 0, 1))
    fails = Case(level="kernel", lengths=(1, 1)).lengths
    assert minimise(case, lambda each: each.lengths in (fails, case.lengths)).lengths == fails


@pytest.mark.parametrize(
    ("cuts", "removed", "left"),
    [
        ((2, 7), 0, (3,)),
        ((2, 7), 1, (2, 6)),
        ((2, 7), 2, (2, 5)),
        ((4,), 0, ()),
        ((16,), 1, (15,)),
    ],
)
def test_cuts_stay_in_their_documents_when_others_go(
    cuts: tuple[int, ...], removed: int, left: tuple[int, ...]
) -> None:
    """A cut of a document that goes ends up on the boundary that is left, and at the very beginning nowhere."""
    case = LAYER.replace(cuts=cuts)
    kept = tuple(length for index, length in enumerate(case.lengths) if index != removed)
    (without,) = [c for c in candidates(fewer_documents, case) if c.lengths == kept]
    assert without.cuts == left


def test_documents_shorten_on_both_sides_and_on_each() -> None:
    case = Case(level="kernel", lengths=(5,), key_lengths=(8,))
    offered = {(c.lengths[0], c.packed_key_lengths[0]) for c in candidates(shorter_documents, case)}
    assert offered >= {(4, 7), (3, 6), (4, 8), (1, 8), (5, 7), (5, 4), (5, 1), (5, 0)}
    assert all(queries <= 5 and keys <= 8 and queries + keys < 13 for queries, keys in offered)


def test_one_shorter_takes_one_token() -> None:
    assert layouts(one_shorter, KERNEL.replace(document_ids=None)) == {
        ((2, 0, 4), (2, 2, 6), (), (0, 1, 2)),
        ((2, 0, 4), (3, 2, 6), (), (0, 1, 2)),
        ((3, 0, 4), (2, 2, 6), (), (0, 1, 2)),
        ((3, 0, 4), (3, 1, 6), (), (0, 1, 2)),
        ((3, 0, 3), (3, 2, 5), (), (0, 1, 2)),
        ((3, 0, 3), (3, 2, 6), (), (0, 1, 2)),
        ((3, 0, 4), (3, 2, 5), (), (0, 1, 2)),
    }
    assert {c.lengths for c in candidates(one_shorter, LAYER)} == {(3, 1, 10), (4, 0, 10), (4, 1, 9)}


def test_neighbours_merge_under_the_first_ones_name() -> None:
    assert layouts(merged_documents, KERNEL) == {
        ((3, 4), (5, 6), (), (7, 6)),
        ((3, 4), (3, 8), (), (7, 5)),
    }
    assert {(c.lengths, c.padding, c.cuts) for c in candidates(merged_documents, LAYER)} == {
        ((5, 10), 3, (2, 7)),
        ((4, 11), 3, (2, 7)),
        ((4, 1, 13), 0, (2, 7)),
    }


def test_cuts_go_and_move_back() -> None:
    offered = {c.cuts for c in candidates(simpler_cuts, LAYER)}
    assert {(2,), (7,), (1, 7), (1, 2), (2, 3), (2, 5), (2, 6)} == offered


def test_tiny_layouts_have_no_more_of_anything() -> None:
    offered = layouts(tiny_layouts, Case(level="kernel", lengths=(2, 1), key_lengths=(9, 2), document_ids=(4, 6)))
    assert ((3,), (9,), (), (0,)) in offered
    assert ((2,), (1,), (), (0,)) in offered
    assert all(lengths[0] <= 3 for lengths, *_ in offered)
    offered = layouts(tiny_layouts, Case(lengths=(7,), cuts=(2, 4), padding=1))
    assert ((3,), None, (1, 2), (0,)) in offered
    assert ((6,), None, (), (0,)) in offered
    assert all(len(lengths) == 1 and len(cuts) <= 2 for lengths, _, cuts, _ in offered)


def test_a_tiny_layout_is_reached_in_a_few_attempts() -> None:
    attempts: list[Case] = []

    def fails(case: Case) -> bool:
        attempts.append(case)
        return len(case.cuts) >= 5

    small = minimise(Case(lengths=(4, 300), cuts=tuple(range(32, 300, 32))), fails)
    assert (small.lengths, small.cuts) == ((6,), (1, 2, 3, 4, 5))
    assert len(attempts) < 100


COMPLICATED = {
    "window": (3, 0),
    "scale": 0.5,
    "softcap": 3.0,
    "query_norm": "rms",
    "key_norm": "rms",
    "value_norm": "rms",
    "shared_key_value": True,
    "rotary": "proportional",
    "rotary_fraction": 0.25,
    "rotary_theta": 100.0,
    "values": "ties",
    "weights": "selection",
    "memory": "sliced",
    "causal": False,
    "seed": 3,
    "dtype": "fp16",
    "padding": 2,
    "padding_ids": (0,),
    "capacity": 5,
    "heads": 4,
    "head_dim": 64,
    "hidden": 24,
}
SIMPLE = Case(lengths=(2,), head_dim=1, hidden=1, dtype="fp32")


@pytest.mark.parametrize("field", COMPLICATED)
def test_every_option_returns_to_its_simplest_value(field: str) -> None:
    """Each by itself, from a case in which nothing else could go."""
    base = SIMPLE.replace(head_dim=2) if field == "rotary" else SIMPLE
    base = base.replace(causal=False) if field == "window" else base
    base = base.replace(lengths=(1, 1)) if field == "padding_ids" else base
    complicated = base.replace(**{field: COMPLICATED[field]})
    assert getattr(minimise(complicated, lambda case: True), field) == getattr(SIMPLE, field)


def test_documents_that_are_padding_keep_being_it_by_the_simplest_names() -> None:
    case = Case(
        lengths=(4, 2, 3, 6, 2), document_ids=(9, 4, 6, 3, 8), padding_ids=(3, 4), padding=1, head_dim=1, hidden=1
    )
    small = minimise(case, lambda each: len(each.padding_spans) > 1 and each.padding_spans[0][0] > 0)
    assert small == Case(lengths=(1, 1), padding_ids=(1,), padding=1, head_dim=1, hidden=1)


def test_an_option_that_matters_stays() -> None:
    case = SIMPLE.replace(heads=4, kv_heads=2, dtype="fp16", memory="sliced", window=(5, -1), head_dim=64, seed=2)
    small = minimise(case, lambda c: c.heads > c.kv_heads and c.dtype != "fp32" and c.window[0] >= 0)
    assert (small.heads, small.kv_heads, small.dtype, small.window) == (2, 1, "bf16", (0, -1))
    assert (small.memory, small.head_dim, small.seed) == ("contiguous", 1, 0)


@pytest.mark.parametrize("layout", ["fused", "sliced"])
def test_a_mixture_becomes_the_layout_that_matters(layout: str) -> None:
    case = SIMPLE.replace(level="kernel", hidden=16, memory="mixed")
    assert minimise(case, lambda c: c.memory in (layout, "mixed")).memory == layout


def test_micro_sequences_are_shortened_with_their_documents_and_later_cuts() -> None:
    offered = layouts(shorter_micro_sequences, LAYER)
    # [2, 7) without its last two tokens, without all but the first, and gone; document 1 has a single token, in there.
    assert ((4, 1, 8), None, (2, 5), (0, 1, 2)) in offered
    assert ((3, 8), None, (2, 3), (0, 2)) in offered
    assert ((2, 8), None, (2,), (0, 2)) in offered
    # Padding is the last micro-sequence's, too.
    assert {case.padding for case in candidates(shorter_micro_sequences, LAYER)} >= {0, 1, 3}


@pytest.mark.parametrize("rows", [2047, 2048, 2049, 4000])
def test_thousands_of_rows_take_dozens_of_attempts(rows: int) -> None:
    attempts: list[Case] = []

    def fails(case: Case) -> bool:
        attempts.append(case)
        return max(case.lengths) >= rows

    drawn = Case(level="kernel", lengths=(2, 4097), key_lengths=(2, 57), head_dim=16, causal=False, dtype="bf16")
    small = minimise(drawn, fails)
    assert (small.lengths, small.packed_key_lengths) == ((rows,), (0,))
    assert len(attempts) < 200


@pytest.mark.parametrize("heads", [(71, 1), (128, 8), (128, 1), (16, 1), (128, 128), (64, 64)])
@pytest.mark.parametrize(
    ("fails", "smallest"),
    [
        (lambda case: case.heads // case.kv_heads > 8, (9, 1)),
        (lambda case: case.heads > 32, (33, 1)),
        (lambda case: case.heads > 32 and case.kv_heads == case.heads, (33, 33)),
        (lambda case: case.heads // case.kv_heads > 8 and case.kv_heads > 4, (45, 5)),
    ],
)
def test_many_heads_become_as_many_as_it_takes(
    heads: tuple[int, int], fails: Callable[[Case], bool], smallest: tuple[int, int]
) -> None:
    case = Case(level="kernel", lengths=(1,), heads=heads[0], kv_heads=heads[1], head_dim=1)
    if fails(case):
        small = minimise(case, fails)
        assert (small.heads, small.kv_heads) == smallest


# All together.

FAILURES: dict[str, Callable[[Case], bool]] = {
    "always": lambda case: True,
    "three tokens": lambda case: case.tokens >= 3,
    "a document of three": lambda case: max(case.lengths) >= 3,
    "two documents": lambda case: sum(length > 0 for length in case.lengths) >= 2,
    "more keys than queries": lambda case: case.packed_key_lengths > case.packed_lengths,
    "a straddling document": straddling,
    "six micro-sequences": lambda case: len(case.cuts) >= 5,
    "two heads": lambda case: case.heads >= 2,
    "half precision": lambda case: case.dtype != "fp32",
    "odd luck": lambda case: hash((case.tokens, case.heads)) % 3 > 0,
}


@settings(max_examples=40, deadline=None)
@given(case=DRAWN, failure=st.sampled_from(sorted(FAILURES)))
def test_what_comes_out_fails_is_no_larger_and_minimal(case: Case, failure: str) -> None:
    asked: list[Case] = []

    def fails(candidate: Case) -> bool:
        asked.append(candidate)
        return FAILURES[failure](candidate)

    small = minimise(case, fails)
    assert len(asked) == len(set(asked))
    assert case not in asked
    if small != case:
        assert FAILURES[failure](small)
    # A query less may be worth a key more, and a token less a wider head: the order says what is simpler.
    assert simplicity(small) <= simplicity(case)
    sizes = [sum(each.packed_lengths) + sum(each.packed_key_lengths) for each in (small, case)]
    assert sizes[0] <= sizes[1] or small.all_ranks < case.all_ranks
    for step in (*PASSES, one_shorter):
        assert not [c for c in candidates(step, small) if c != small and FAILURES[failure](c) and c not in (case,)]


def test_keys_do_not_become_more_so_that_there_are_as_many_as_queries() -> None:
    case = Case(level="kernel", lengths=(0, 1, 2), key_lengths=(0, 1, 0), dtype="fp32")
    small = minimise(case, FAILURES["a document of three"])
    assert (small.lengths, small.key_lengths) == ((3,), (0,))
    # Where that makes them no more, it is simpler.
    small = minimise(case.replace(key_lengths=(0, 1, 2)), lambda each: each.tokens == sum(each.packed_key_lengths) == 3)
    assert (small.lengths, small.key_lengths) == ((3,), None)


@settings(max_examples=40, deadline=None)
@given(case=DRAWN)
def test_all_that_is_offered_is_simpler(case: Case) -> None:
    for step in (*PASSES, one_shorter):
        assert not [c for c in candidates(step, case) if c != case and not simplicity(c) < simplicity(case)]


def test_no_option_is_worth_a_token_or_a_document_and_no_layout_a_rank() -> None:
    plain = Case(lengths=(2, 1), ranks=1)
    fancy = plain.replace(lengths=(3,), cuts=(1,), heads=4, head_dim=64, dtype="bf16", memory="strided", seed=9)
    fewer = fancy.replace(lengths=(2,))
    assert simplicity(fewer) < simplicity(fancy) < simplicity(plain) < simplicity(fewer.replace(ranks=2, cuts=()))
    kernel = Case(level="kernel", lengths=(3,), key_lengths=(1,))
    assert (
        simplicity(kernel) < simplicity(kernel.replace(key_lengths=None)) < simplicity(kernel.replace(key_lengths=(3,)))
    )


@pytest.mark.parametrize(
    ("failure", "tokens", "documents"),
    [
        ("always", 1, 1),
        ("three tokens", 3, 1),
        ("two documents", 2, 2),
        ("a straddling document", 2, 1),
        ("six micro-sequences", 6, 1),
    ],
)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_smallest_is_reached(failure: str, tokens: int, documents: int, data: st.DataObject) -> None:
    case = data.draw(cases("layer", DOMAIN).filter(FAILURES[failure]))
    small = minimise(case, FAILURES[failure])
    assert (small.tokens, len(small.packed_lengths)) == (tokens, documents)


def test_a_document_keeps_its_values_while_others_go() -> None:
    """The failure hangs on one document's values; they stay while documents in front of it are shrunk away."""
    case = Case(level="kernel", lengths=(5, 2, 0, 4, 3), head_dim=4)
    needle = draw(case, "q", 1, 4, "cpu")[7:10]

    def holds_needle(candidate: Case) -> bool:
        q = draw(candidate, "q", 1, candidate.head_dim, "cpu")
        return candidate.head_dim == 4 and any((q[i : i + 3] == needle).all() for i in range(len(q) - 2))

    small = minimise(case, holds_needle)
    assert (small.lengths, small.document_ids) == ((3,), (3,))


# The clock.


@pytest.mark.parametrize("budget", [0, 1, 4, 8])
def test_the_deadline_ends_it_with_what_has_been_reached(budget: int) -> None:
    case = Case(level="kernel", lengths=(9, 8, 7, 6), heads=4, head_dim=64)
    calls: list[Case] = []

    def fails(candidate: Case) -> bool:
        calls.append(candidate)
        return candidate.tokens >= 3

    small = minimise(case, fails, budget - 0.5, lambda: float(len(calls)))
    assert len(calls) == budget
    reached = [candidate for candidate in calls if candidate.tokens >= 3]
    assert small == (reached[-1] if reached else case)
