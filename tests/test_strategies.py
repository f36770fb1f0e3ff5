"""What is drawn: possible cases, all of the space, and nothing that a backend does not take."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.backends.registry import calls_of
from attn_fuzz.generation import options, strategies
from attn_fuzz.generation.domain import HEAD_DIMS, HEAD_GROUPS, MANY_HEADS, Domain
from attn_fuzz.generation.drawing import FEW, few_cases
from attn_fuzz.generation.layouts import FEW_KEYS, LONG_ROWS, LONG_SQUARES, MAX_PAIRS
from attn_fuzz.generation.strategies import cases, straddling
from attn_fuzz.reference.case import DTYPES, LEVELS, MEMORIES, ROTARIES, VALUES, Case
from attn_fuzz.reference.layout import active_extent, micro_sequences, segments

ALL = Capabilities()


def drawn(
    level: str, capabilities: Capabilities, *, seeds: int = 8, count: int = FEW, dtypes: tuple[str, ...] = ()
) -> list[Case]:
    """So many cases of a level from each of several seeds, always the same ones."""
    found: list[Case] = []

    def keep(case: Case) -> None:
        found.append(case)

    for number in range(seeds):
        few_cases(level, Domain.of(capabilities, "cpu", dtypes), number, keep, count)
    return found


@functools.cache
def sample(level: str) -> list[Case]:
    """Cases of a backend that takes everything."""
    return drawn(level, ALL, seeds=105)


@settings(max_examples=60, deadline=None)
@given(case=st.one_of(*(cases(level, Domain.of(ALL, "cpu")) for level in LEVELS)))
def test_a_drawn_case_survives_json(case: Case) -> None:
    """Building a case validates it, so that one that comes back is possible, too."""
    assert Case.from_json(case.to_json()) == case
    assert case.tokens <= 4200
    assert case.seed < 8


# The whole space is drawn from.


def queries_and_keys(case: Case) -> list[tuple[int, int]]:
    return [pair for call in calls_of(case) for pair in call]


def past(case: Case) -> list[tuple[int, int]]:
    """(first_document_begin, past_length) of all micro-sequences but the first."""
    return [(active_extent(case.packed_lengths, part).begin, part.begin) for part in micro_sequences(case)[1:]]


def parts_of_longest(case: Case) -> int:
    """In how many micro-sequences the document is that is in most of them."""
    active = [segment.document for part in micro_sequences(case) for segment in segments(case.packed_lengths, part)]
    return max(Counter(active).values())


KERNEL: dict[str, Callable[[Case], bool]] = {
    "empty documents": lambda case: (0, 0) in queries_and_keys(case),
    "documents without queries": lambda case: any(q == 0 < k for q, k in queries_and_keys(case)),
    "documents without keys": lambda case: any(k == 0 < q for q, k in queries_and_keys(case)),
    "fewer queries than keys": lambda case: any(0 < q < k for q, k in queries_and_keys(case)),
    "more queries than keys": lambda case: any(q > k > 0 for q, k in queries_and_keys(case)),
    "rows beyond the last document": lambda case: case.capacity > 0,
    "windows to the right only": lambda case: case.window[0] < 0 < case.window[1],
    "broadcast memory": lambda case: case.memory == "broadcast",
    "more documents than threads in a warp": lambda case: len(case.lengths) > 32,
    "a document of more than 256 queries": lambda case: max(case.lengths) > 257,
    "a past of thousands": lambda case: max(case.packed_key_lengths) > 2000,
    "more than eight heads": lambda case: case.heads > 8,
}
LAYER: dict[str, Callable[[Case], bool]] = {
    "empty documents": lambda case: 0 in case.lengths,
    "cuts inside documents": straddling,
    "many micro-sequences": lambda case: len(case.cuts) > 10,
    "equally long micro-sequences": lambda case: (
        len(case.cuts) > 3 and len({b - a for a, b in itertools.pairwise((0, *case.cuts))}) == 1
    ),
    "micro-sequences of one token in a row": lambda case: (
        sum(b - a == 1 for a, b in itertools.pairwise((0, *case.cuts, case.tokens))) > 2
    ),
    "a cut on every boundary": lambda case: (
        len(case.packed_lengths) > 2 and {0, *case.cuts, case.tokens} >= {0, *itertools.accumulate(case.packed_lengths)}
    ),
    "rotary bases": lambda case: case.rotary_theta != 10000.0,
    "rotary fractions": lambda case: case.rotary_fraction != 0.5,
    "cuts on boundaries": lambda case: bool(case.cuts) and not straddling(case),
    "several cuts": lambda case: len(case.cuts) > 2,
    "a document over three micro-sequences": lambda case: parts_of_longest(case) >= 3,
    "a past": lambda case: any(length > 0 for _, length in past(case)),
    "a past that nobody sees": lambda case: any(begin == length for begin, length in past(case)),
    "a past of which only a part is seen": lambda case: any(0 < begin < length for begin, length in past(case)),
    "padding": lambda case: case.padding > 0,
    "a cut inside padding": lambda case: any(cut > sum(case.lengths) for cut in case.cuts),
    "norms": lambda case: "rms" in (case.query_norm, case.key_norm, case.value_norm),
    "shared keys and values": lambda case: case.shared_key_value,
    "selection weights": lambda case: case.weights == "selection",
    "spare rows in the buffer": lambda case: case.capacity > 0,
}
BOTH: dict[str, Callable[[Case], bool]] = {
    "one document": lambda case: len(case.lengths) == 1,
    "many documents": lambda case: len(case.lengths) > 10,
    "more documents than a byte counts": lambda case: len(case.lengths) > 256,
    "a long document beside short ones": lambda case: max(case.lengths) > 100 and len(case.lengths) > 2,
    "a tile less one row": lambda case: bool({15, 31, 63, 127} & set(case.lengths)),
    "a tile": lambda case: bool({16, 32, 64, 128} & set(case.lengths)),
    "a tile and one row": lambda case: bool({17, 33, 65, 129} & set(case.lengths)),
    "causal": lambda case: case.causal,
    "not causal": lambda case: not case.causal,
    "causal windows": lambda case: case.causal and case.window[0] >= 0,
    "windows of the row alone": lambda case: case.window[0] == 0,
    "windows to the right": lambda case: case.window[1] > 0,
    "windows wider than any document": lambda case: case.window[0] >= max(case.packed_lengths),
    "scales": lambda case: case.scale is not None,
    "softcap": lambda case: case.softcap > 0,
    "MHA": lambda case: case.heads == case.kv_heads > 1,
    "GQA": lambda case: case.heads > case.kv_heads > 1,
    "MQA": lambda case: case.heads > case.kv_heads == 1,
    "odd head_dim": lambda case: case.head_dim % 2 == 1,
    "packed heads": lambda case: case.head_dim > 128,
}


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_the_space_is_covered(level: str) -> None:
    features = {**BOTH, **(KERNEL if level == "kernel" else LAYER)}
    counts = {what: sum(map(has, sample(level))) for what, has in features.items()}
    assert [what for what, count in counts.items() if count == 0] == []
    assert {case.dtype for case in sample(level)} == set(DTYPES)
    assert {case.values for case in sample(level)} == set(VALUES)
    assert set(HEAD_GROUPS) <= {(case.heads, case.kv_heads) for case in sample(level)} <= {*HEAD_GROUPS, *MANY_HEADS}
    head_dims = {case.head_dim for case in sample(level)}
    assert head_dims >= set(HEAD_DIMS)
    assert all(dim % 8 == 0 for dim in head_dims - set(HEAD_DIMS))
    assert {case.memory for case in sample(level)} == set(MEMORIES) - ({"broadcast"} if level == "layer" else set())
    assert level == "kernel" or {case.rotary for case in sample(level)} == set(ROTARIES)


# What large models have is drawn seldom.


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_many_heads_are_a_few_of_a_hundred_cases(level: str) -> None:
    count = sum((case.heads, case.kv_heads) in MANY_HEADS for case in sample(level))
    assert 0.01 <= count / len(sample(level)) <= 0.08


@pytest.mark.slow
def test_long_rows_are_a_few_of_a_hundred_kernel_cases() -> None:
    count = sum(max(case.lengths) in LONG_ROWS for case in sample("kernel"))
    assert 0.01 <= count / len(sample("kernel")) <= 0.05
    assert max(max(case.lengths) for case in sample("layer")) <= 300


@pytest.fixture
def many_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases have many heads, where their documents are short enough."""
    monkeypatch.setattr(options, "_MANY_HEADS_ONCE_IN", 1)


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernel cases have a document of thousands of queries, half of them as many keys."""
    monkeypatch.setattr(strategies, "_LONG_ROWS_ONCE_IN", 1)
    monkeypatch.setattr(strategies, "_LONG_SQUARE_ONCE_IN", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("many_heads")
@pytest.mark.parametrize("level", LEVELS)
def test_every_number_of_many_heads_is_drawn_and_affordable(level: str) -> None:
    found = [case for case in drawn(level, ALL, seeds=80) if (case.heads, case.kv_heads) in MANY_HEADS]
    assert {(case.heads, case.kv_heads) for case in found} == set(MANY_HEADS)
    assert {9, 16, 32, 64, 71, 128} <= {case.heads // case.kv_heads for case in found}
    for case in found:
        pairs = sum(case.packed_lengths) ** 2
        assert case.heads * pairs <= MAX_PAIRS
        assert case.heads * case.head_dim * pairs <= 1 << 24
        assert case.level == "kernel" or case.heads * case.head_dim <= 2048


@pytest.mark.usefixtures("many_heads")
@pytest.mark.parametrize("level", LEVELS)
def test_many_heads_are_not_shared_where_heads_are_not(level: str) -> None:
    found = drawn(level, dataclasses.replace(ALL, gqa=False), seeds=20)
    assert {40, 64, 128} <= {case.heads for case in found}
    assert all(case.heads == case.kv_heads for case in found)


def documents_of_thousands(case: Case) -> list[tuple[int, int]]:
    return [(q, k) for q, k in queries_and_keys(case) if q > 1100]


@pytest.mark.slow
@pytest.mark.usefixtures("long_rows")
def test_every_number_of_long_rows_is_drawn_and_affordable() -> None:
    few, squares = set(), set()
    for case in drawn("kernel", ALL, seeds=40, count=12):
        ((queries, keys),) = documents_of_thousands(case)
        pairs = sum(case.packed_lengths) * sum(case.packed_key_lengths)
        if queries == keys:
            squares.add(queries)
            assert (case.causal, case.heads, case.dtype) == (True, 1, "fp32")
            assert pairs * case.head_dim <= 16 * 2**22.1
        else:
            few.add((queries, case.causal))
            assert 1 <= keys <= FEW_KEYS
            assert case.heads * pairs <= 1.2 * MAX_PAIRS
            assert case.heads * case.head_dim * pairs <= 1 << 24
    assert few == set(itertools.product(LONG_ROWS, (False, True)))
    assert squares == set(LONG_SQUARES["cpu"])


FEWER: dict[str, tuple[dict[str, object], Callable[[Case, int, int], bool]]] = {
    "no rows without keys": ({"queries_without_keys": False}, lambda case, q, k: q == k or not case.causal),
    "top-left": ({"causal_needs_equal_lengths": True}, lambda case, q, k: q == k or not case.causal),
    "causal only": ({"noncausal": False}, lambda case, q, k: case.causal),
    "causal squares only": ({"noncausal": False, "queries_without_keys": False}, lambda case, q, k: q == k),
    "not causal": ({"causal": False}, lambda case, q, k: q != k and not case.causal),
    "half precision": ({"dtypes": ("bf16",)}, lambda case, q, k: case.dtype == "bf16"),
}


@pytest.mark.usefixtures("long_rows")
@pytest.mark.parametrize("name", FEWER)
def test_long_rows_are_as_the_backend_takes_them(name: str) -> None:
    changes, holds = FEWER[name]
    found = drawn("kernel", dataclasses.replace(ALL, **changes), seeds=12)  # type: ignore[arg-type]
    pairs = [(case, *pair) for case in found for pair in documents_of_thousands(case)]
    assert pairs
    assert all(holds(*each) for each in pairs)


@pytest.mark.usefixtures("many_heads", "long_rows")
@pytest.mark.parametrize(
    "capabilities", [Capabilities(layouts=8), Capabilities(configurations=(Configuration("bf16", 16, 2, 1, True),))]
)
def test_pools_of_compiling_backends_stay_as_they_are(capabilities: Capabilities) -> None:
    for case in drawn("kernel", capabilities, seeds=10):
        assert not documents_of_thousands(case)
        assert not capabilities.configurations or (case.heads, case.kv_heads) == (2, 1)


def test_most_layer_cases_are_cut_and_many_inside_a_document() -> None:
    """The bugs that this project grew out of need that."""
    found = drawn("layer", ALL, seeds=30)
    cut = [case for case in found if case.cuts]
    assert len(cut) > len(found) / 3
    assert sum(map(straddling, cut)) > len(cut) / 3


@pytest.mark.parametrize(
    ("lengths", "cuts", "inside"),
    [((4, 3), (4,), False), ((4, 3), (3,), True), ((4, 3), (), False), ((4, 0, 3), (4,), False), ((4,), (1, 2), True)],
)
def test_a_straddling_document_is_one_with_a_cut_inside(
    lengths: tuple[int, ...], cuts: tuple[int, ...], inside: bool
) -> None:
    assert straddling(Case(lengths=lengths, cuts=cuts)) == inside


# Capabilities.

NARROW: dict[str, tuple[dict[str, object], Callable[[Case], bool]]] = {
    "dtypes": ({"dtypes": ("bf16",)}, lambda case: case.dtype == "bf16"),
    "max_head_dim": ({"max_head_dim": 64}, lambda case: case.head_dim <= 64),
    "head_dim_multiple": ({"head_dim_multiple": 8}, lambda case: case.head_dim % 8 == 0),
    "an odd multiple": ({"head_dim_multiple": 7, "max_head_dim": 7}, lambda case: case.head_dim == 7),
    "gqa": ({"gqa": False}, lambda case: case.heads == case.kv_heads),
    "noncausal": ({"noncausal": False}, lambda case: case.causal),
    "causal": ({"causal": False}, lambda case: not case.causal),
    "window": ({"window": False}, lambda case: case.window == (-1, -1)),
    "softcap": ({"softcap": False}, lambda case: case.softcap == 0),
    "scale": ({"scale": False}, lambda case: case.scale is None),
    "empty_documents": ({"empty_documents": False}, lambda case: (0, 0) not in queries_and_keys(case)),
    "norms": ({"norms": False}, lambda case: case.query_norm == case.key_norm == case.value_norm == "none"),
    "rotaries": ({"rotaries": ("none", "default")}, lambda case: case.rotary != "proportional"),
    "shared_key_value": ({"shared_key_value": False}, lambda case: not case.shared_key_value),
    "memories": ({"memories": ("contiguous", "fused")}, lambda case: case.memory in ("contiguous", "fused")),
    "capacity": ({"capacity": False}, lambda case: case.capacity == 0),
}


OF_ONE_LEVEL = {"norms": "layer", "rotaries": "layer", "shared_key_value": "layer", "capacity": "kernel"}
AT_LEVELS = [(name, level) for name in NARROW for level in LEVELS if OF_ONE_LEVEL.get(name, level) == level]


@pytest.mark.parametrize(("name", "level"), AT_LEVELS)
def test_what_a_backend_does_not_take_is_not_drawn(name: str, level: str) -> None:
    changes, holds = NARROW[name]
    narrow = drawn(level, dataclasses.replace(ALL, **changes), seeds=4)  # type: ignore[arg-type]
    assert [case for case in narrow if not holds(case)] == []


@pytest.mark.slow
@pytest.mark.usefixtures("many_heads", "long_rows")
@pytest.mark.parametrize(("name", "level"), AT_LEVELS)
def test_nor_is_it_with_many_heads_or_long_rows(name: str, level: str) -> None:
    test_what_a_backend_does_not_take_is_not_drawn(name, level)


@pytest.mark.slow
def test_several_limits_at_once_leave_cases_that_are_taken() -> None:
    capabilities = Capabilities(
        dtypes=("fp16", "bf16"),
        max_head_dim=96,
        head_dim_multiple=8,
        causal_needs_equal_lengths=True,
        queries_without_keys=False,
        empty_documents=False,
        softcap=False,
    )
    for level, least in (("kernel", 0.6), ("layer", 0.3)):
        found = drawn(level, capabilities, seeds=20, dtypes=("bf16", "fp32"))
        taken = [case for case in found if capabilities.refusal(case, "cpu", queries_and_keys(case)) is None]
        assert {case.dtype for case in found} == {"bf16"}
        assert len(taken) >= least * len(found), level


def test_a_domain_without_dtypes_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the dtypes fp32 is taken; there are bf16"):
        Domain.of(Capabilities(dtypes=("bf16",)), "cpu", ("fp32",))
