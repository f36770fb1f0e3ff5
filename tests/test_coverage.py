"""Which values of a case's axes were reached, and which could be."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random

import pytest
from doubles import double
from reach import Drawer

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.backends.loop import Loop
from attn_fuzz.coverage.aims import aim_at
from attn_fuzz.coverage.allowed import LEFT_OUT, Space
from attn_fuzz.coverage.axes import AXES, PLACES, VALUES, Value, options_of
from attn_fuzz.coverage.counts import Counts, Reached, lengths_of
from attn_fuzz.generation.domain import Domain
from attn_fuzz.nights.aims import rarest
from attn_fuzz.nights.holes import Coverage
from attn_fuzz.reference.case import Case

KERNEL = Case(level="kernel", lengths=(1, 20, 300), key_lengths=(70, 20, 2), heads=6, kv_heads=2, window=(3, -1))
LAYER = Case(lengths=(3, 4), cuts=(2, 5), dtype="bf16", softcap=2.5, causal=True)
EMPTY = Case(level="kernel", lengths=(0, 2), key_lengths=(0, 2), causal=False, window=(-1, 4), memory="broadcast")


def counted(*cases: Case, mode: str = "case", questions: tuple[str, ...] = ()) -> Reached:
    counts = Counts()
    for case in cases:
        counts.count([case], mode, questions)
    return counts.take()


# Counting.


def test_values_of_a_case() -> None:
    assert options_of(KERNEL) == {
        "dtype": "fp32",
        "head_dim": "16",
        "group": "3",
        "mask": "causal",
        "window": "left",
        "softcap": "off",
        "LSE gradient": "off",
        "value channels": "same",
        "memory": "contiguous",
        "max_seqlen": "tight",
        "gaps": "none",
        "level": "kernel",
    }
    assert options_of(EMPTY)["window"] == "right"
    assert options_of(KERNEL.replace(head_dim=17))["head_dim"] == "other"
    assert options_of(KERNEL.replace(heads=16, kv_heads=1))["group"] == "9-"


def test_lengths_of_a_layer_are_those_of_its_micro_sequences() -> None:
    # [0, 2), [2, 5), [5, 7): the second document begins at 3 and is cut at 5.
    assert Counter(lengths_of(LAYER)) == Counter([(2, 2), (1, 3), (2, 2), (2, 4)])


def test_pairs_are_of_one_case_and_of_lengths_of_one_document() -> None:
    reached = counted(KERNEL, questions=("needle",))
    assert reached.pairs[("dtype", "fp32"), ("dtype", "fp32")] == 1
    assert reached.pairs[("window", "left"), ("question", "needle")] == 1
    assert reached.pairs[("queries", "256-"), ("keys", "2-15")] == 1
    # Of no document, though one has such queries and another such keys.
    assert (("queries", "256-"), ("keys", "64-127")) not in reached.pairs
    assert reached.lengths == {(1, 64): 1, (16, 16): 1, (256, 2): 1}


def expected(case: Case, mode: str) -> Counter[tuple[Value, Value]]:
    """By definition, one pair after another."""
    classes = {axis.name: axis.values for axis in AXES}

    def named(axis: str, number: int) -> Value:
        spans = [(int(name.split("-")[0]), name) for name in classes[axis]]
        return axis, max((begin, name) for begin, name in spans if begin <= number)[1]

    documents = {(named("queries", q), named("keys", k)) for q, k in lengths_of(case)}
    mine = {*options_of(case).items(), ("mode", mode), named("documents", len(case.packed_lengths))}
    mine |= {value for pair in documents for value in pair}
    ordered = sorted(mine, key=lambda value: PLACES[value])
    found = Counter(itertools.combinations_with_replacement(ordered, 2))
    for pair in list(found):
        if (pair[0][0], pair[1][0]) == ("queries", "keys") and pair not in documents:
            del found[pair]
    return found


def test_pairs_are_counted_as_they_are_defined() -> None:
    drawn: list[Case] = []
    drawer = Drawer(registry.load("loop"))
    drawer.note = lambda cases, mode, questions: drawn.extend(cases)  # type: ignore[method-assign]
    drawer.draw_all(2, 4)
    cases = [KERNEL, LAYER, EMPTY, *drawn]
    together = Counter[tuple[Value, Value]]()
    for case in cases:
        together += expected(case, "case")
    assert counted(*cases).pairs == together


def test_a_batch_counts_as_its_calls_do() -> None:
    calls = [KERNEL.replace(lengths=(n, 1), key_lengths=(n, 3)) for n in range(1, 40)]
    counts = Counts()
    counts.count(calls, "batch", ["keys"])
    assert counts.take() == counted(*calls, mode="batch", questions=("keys",))
    assert not counts.take()


def test_what_was_refused_is_counted_by_why() -> None:
    counts = Counts()
    for reason in ("head_dim 320", "memory ran out: tried to allocate 2 GiB", "memory ran out: tried 3 GiB"):
        counts.refuse(reason)
    assert counts.take().refused == {"head_dim 320": 1, "memory ran out": 2}


# What is allowed.


def space(**capabilities: object) -> Space:
    return Space(Capabilities(**capabilities), "cpu", ("kernel", "layer"), ("kernel", "layer"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capabilities", "one", "other"),
    [
        ({"dtypes": ("fp32",)}, ("dtype", "bf16"), ("mask", "full")),
        ({"head_dims": (64, 128)}, ("head_dim", "16"), ("mask", "full")),
        ({"gqa": False}, ("group", "2"), ("mask", "full")),
        ({"noncausal": False}, ("mask", "full"), ("level", "layer")),
        ({"window_needs_causal": True}, ("mask", "full"), ("window", "left")),
        ({"softcap": False}, ("softcap", "on"), ("level", "layer")),
        ({"memories": ("contiguous",)}, ("memory", "fused"), ("level", "layer")),
        ({"queries_without_keys": False}, ("queries", "2-15"), ("keys", "0")),
        ({"keys_without_queries": False}, ("queries", "0"), ("keys", "2-15")),
        ({"empty_documents": False}, ("queries", "0"), ("keys", "0")),
    ],
)
def test_what_is_not_declared_is_no_hole(capabilities: dict[str, object], one: Value, other: Value) -> None:
    assert space().why_not(one, other) is None
    assert space(**capabilities).why_not(one, other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("mask", "causal"), ("window", "right")),
        (("memory", "broadcast"), ("level", "layer")),
        (("memory", "broadcast"), ("mode", "batch")),
        (("queries", "0"), ("level", "layer")),
        (("LSE gradient", "on"), ("level", "layer")),
        (("queries", "0"), ("documents", "1")),
        (("documents", "1"), ("mode", "packed")),
        (("level", "layer"), ("question", "turned")),
        (("mode", "packed"), ("question", "halves")),
        (("dtype", "fp32"), ("dtype", "bf16")),
    ],
)
def test_what_no_case_can_be_is_no_hole(one: Value, other: Value) -> None:
    assert space().why_not(one, other) is not None


def test_of_a_compiling_backend_only_what_it_compiles() -> None:
    chosen = (Configuration("bf16", 64, 4, 2, True), Configuration("fp32", 128, 2, 2, False))
    compiling = space(configurations=chosen)
    assert compiling.why_not(("dtype", "bf16"), ("head_dim", "64")) is None
    assert compiling.why_not(("dtype", "bf16"), ("head_dim", "128")) is not None


def test_an_aim_is_what_draws_have() -> None:
    domain = Domain.of(Capabilities(), "cpu", aim={"head_dim": (192, 7), "heads": ((16, 1),)})
    assert domain.towards("head_dim", [16, 192, 64]) == [192]
    # Where none can be had, anything.
    assert domain.towards("head_dim", [16, 64]) == [16, 64]
    assert domain.towards("memory", ["fused"]) == ["fused"]


def test_a_slice_aims_at_what_was_had_least() -> None:
    of = space(head_dims=(64, 128), memories=("contiguous",), dtypes=("fp32", "bf16"), gqa=False)
    reached = dict.fromkeys(of.pairs(), 100)
    reached[("head_dim", "128"), ("mode", "case")] = 3
    reached[("dtype", "bf16"), ("head_dim", "128")] = 2
    assert rarest(of, reached, "case", "kernel", Random(0)) == {"head_dim": (128,), "dtype": ("bf16",)}


def test_windows_that_causal_attention_has_not_are_aimed_at_without_it() -> None:
    assert aim_at(space(), ("dtype", "fp16"), ("window", "right")) == {"dtype": ("fp16",), "causal": (False,)}


# Holes.


def test_holes_are_values_without_a_case_and_pairs_of_values_that_have_some() -> None:
    a, b, c = VALUES[0], VALUES[5], VALUES[40]
    covered = Coverage("loop", "cpu", {a: 2, b: 1, c: 0}, {(a, b): 0, (a, c): 0, (b, c): 0}, Counter())
    assert covered.values_never == [c]
    assert covered.pairs_never == [(a, b)]
    assert covered.share == pytest.approx(2 / 6)


@pytest.mark.slow
def test_strategies_reach_every_pair_that_is_declared_and_no_other() -> None:
    """Of a kernel of three head dimensions, for there would be many more pairs of all; the rest is the loop's.

    At first anything is drawn, then what may have the pairs that are missing; a pair that no draw can have stays.
    """
    drawer = Drawer(double(Loop(), head_dims=(16, 5, 128), lse_gradient=True))
    drawer.draw_all(16, 30)
    for _ in range(400):
        for pair in (missing := drawer.missing()):
            drawer.draw_towards(pair)
        drawer.take()
        if not missing:
            break
    assert drawer.missing() == []
    left_out = set(LEFT_OUT["cpu"])
    pairs = {(one, other) for one, other in drawer.reached if one[0] != other[0]}
    assert pairs - left_out - set(drawer.allowed) == set()
