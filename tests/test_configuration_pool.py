"""The configurations of a compiling backend: which come when, and what they cost by the clock of the test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.campaign.configuration_pool import GROWS_EVERY, SHARE, ConfigurationPool, Growth, Step, steps
from attn_fuzz.generation.configurations import FIRST, MOST, in_order
from attn_fuzz.generation.domain import Domain

COMPILING, LOADING = 8.0, 0.5


class Time:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Beside:
    """Stands for a process that compiles ahead: it takes ``COMPILING`` seconds of the test's clock."""

    def __init__(self, time: Time, disk: set[Step]) -> None:
        self.time, self.disk = time, disk
        self.at_work: Step | None = None
        self.until, self.closed = 0.0, False

    def give(self, step: Step) -> None:
        assert self.at_work is None
        self.at_work, self.until = step, self.time.now + COMPILING

    def taken(self) -> float | None:
        if self.time.now < self.until:
            return None
        step, self.at_work = self.at_work, None
        assert step is not None
        self.disk.add(step)
        return COMPILING

    def close(self) -> None:
        self.at_work, self.closed = None, True


class Bench:
    """A pool with everything around it."""

    def __init__(
        self, compilers: int = 1, *, kept: bool = True, by_turns: bool = False, seed: int = 0, layouts: int = 0
    ) -> None:
        self.time = Time()
        self.kept, self.loaded, self.disk = kept, list[Configuration](), set[Step]()
        self.steps: list[Step] = []
        self.beside = [Beside(self.time, self.disk) for _ in range(compilers)]
        growth = Growth(load=self.load, seed=seed, by_turns=by_turns, clock=self.time)
        self.pool = ConfigurationPool(steps(in_order(domain(), seed), layouts), self.beside, growth)

    def load(self, step: Step) -> None:
        assert step.configuration in self.pool.taken, "it is compiled for cases, which must be taken"
        self.loaded.append(step.configuration)
        self.steps.append(step)
        self.time.now += LOADING if self.kept and step in self.disk else COMPILING

    def turns(self, count: int, seconds: float = 1.0) -> list[Configuration]:
        """What so many turns of so many seconds draw from."""
        found = []
        for turn in range(count):
            found.append(self.pool.at(turn))
            self.time.now += seconds
        return found


def domain(**capabilities: object) -> Domain:
    return Domain.of(Capabilities(**capabilities), "cpu")  # type: ignore[arg-type]


# Which come first.


def test_the_first_few_are_the_same_for_every_seed_and_those_that_follow_are_not() -> None:
    orders = [list(in_order(domain(), seed)) for seed in (0, 1, FIRST)]
    assert [len(set(order)) for order in orders] == [MOST] * 3
    assert {frozenset(order[:FIRST]) for order in orders} == {frozenset(orders[0][:FIRST])}
    assert orders[0][0] == orders[2][0] != orders[1][0]
    assert orders[0][FIRST:] != orders[2][FIRST:]
    assert list(in_order(domain(), 1)) == orders[1]


def test_a_few_configurations_cover_what_there_is() -> None:
    first = list(islice(in_order(domain(), 0), FIRST))
    assert {each.dtype for each in first} == {"fp32", "bf16", "fp16"}
    assert len({each.head_dim for each in first}) >= FIRST - 1
    assert len({each.heads // each.kv_heads for each in first}) >= 4
    assert {each.causal for each in first} == {True, False}
    assert len({(each.causal, each.window) for each in first}) >= 5
    assert {each.softcap for each in first} == {0.0, 20.0}
    assert len({each.head_dim for each in in_order(domain(), 0)}) > 15


NARROW: dict[str, dict[str, object]] = {
    "causal only": {"noncausal": False},
    "no window": {"window": False},
    "window of causal attention only": {"window_needs_causal": True},
    "no groups": {"gqa": False},
    "values as wide as keys beside groups": {"head_dims_v": True, "gqa_head_dims_v": False},
    "few head dimensions": {"head_dims": (64, 128), "dtypes": ("bf16",)},
    "no softcap": {"softcap": False, "head_dim_multiple": 8},
}


@pytest.mark.parametrize("what", NARROW)
def test_what_is_not_taken_is_no_configuration(what: str) -> None:
    from attn_fuzz.campaign.warm_up import LAYOUTS
    from attn_fuzz.generation.options import options_within
    from attn_fuzz.reference.case import Case

    narrow = domain(**NARROW[what])
    for configuration in in_order(narrow, 3):
        options = options_within(configuration, narrow.capabilities, (7,), lambda some: some[0])
        case = Case(level="kernel", lengths=LAYOUTS[0], **options)  # type: ignore[arg-type]
        assert narrow.capabilities.refusal(case, "cpu", [(n, n) for n in LAYOUTS[0]]) is None
        assert Configuration.of(case) == configuration


def test_declared_configurations_are_the_only_ones() -> None:
    declared = tuple(Configuration(dtype, 64, 2, 1, True) for dtype in ("bf16", "fp16", "fp32"))
    narrow = Domain.of(Capabilities(configurations=declared), "cpu", ("fp32", "bf16"))
    assert list(in_order(narrow, 0)) == [declared[0], declared[2]]
    assert list(in_order(narrow, 1)) == [declared[2], declared[0]]


def test_configurations_that_were_called_take_turns_with_those_that_cover_more() -> None:
    called = tuple(Configuration("bf16", dim, 2, 2, True) for dim in (64, 1, 8, 16))
    order = list(in_order(domain(compiled_first=called), 0))
    assert set(order[0:8:2]) == set(called)
    assert not set(order[1:8:2]) & set(called)
    assert {each.causal for each in order[:4]} == {True, False}
    assert len(set(order)) == len(order) == MOST


def test_words_name_a_configuration() -> None:
    assert Configuration("bf16", 64, 4, 2, True, "left").words() == "bf16 64 4/2 causal left"
    assert Configuration("fp32", 8, 1, 1, False, "both", 20.0).words() == "fp32 8 1/1 full left right softcap 20"


# When they join.


def test_a_campaign_begins_with_one_and_goes_on_while_others_are_compiled() -> None:
    bench = Bench()
    bench.pool.begin()
    assert bench.time.now == COMPILING
    assert len(bench.loaded) == 1
    drawn = bench.turns(100)
    # Nobody waits: 100 turns take a second each, and a load half a second.
    assert bench.time.now == pytest.approx(COMPILING + 100 + LOADING * (len(bench.loaded) - 1))
    assert set(drawn) <= set(bench.loaded)
    assert 100 // COMPILING <= len(bench.loaded) <= 100 // COMPILING + 2
    assert bench.pool.waited == pytest.approx(COMPILING + LOADING * (len(bench.loaded) - 1))
    assert bench.pool.compiled == pytest.approx(COMPILING * (len(bench.loaded) - 1))


def test_few_compile_before_the_first_case() -> None:
    bench, at_work = Bench(4), list[int]()
    load = bench.load

    def watched(step: Step) -> None:
        at_work.append(sum(each.at_work is not None for each in bench.beside))
        load(step)

    growth = Growth(load=watched, seed=0, clock=bench.time)
    bench.pool = ConfigurationPool(steps(in_order(domain(), 0), 0), bench.beside, growth)
    bench.pool.begin()
    assert at_work == [1]
    bench.pool.at(0)
    assert all(each.at_work is not None for each in bench.beside)


def test_more_processes_compile_more() -> None:
    few, many = Bench(1), Bench(4)
    for bench in (few, many):
        bench.pool.begin()
        bench.turns(20)
    assert len(many.pool.taken) > 2 * len(few.pool.taken)


def test_nobody_compiles_far_ahead_of_what_there_is_time_for() -> None:
    bench = Bench(4)
    bench.pool.begin()
    # A worker that never has time for another one.
    bench.pool.waited += 1e9
    bench.turns(200)
    assert len(bench.disk) <= 4 * 2


def test_what_is_not_kept_on_disk_is_compiled_by_the_worker_for_a_share_of_the_time() -> None:
    bench = Bench(2, kept=False)
    bench.pool.begin()
    bench.turns(400)
    assert all(each.closed for each in bench.beside)
    assert 4 <= len(bench.pool.taken) <= 400 * SHARE / (1 - SHARE) / COMPILING + 2
    assert len(set(bench.loaded)) == len(bench.loaded)


def test_a_campaign_of_so_many_cases_is_the_same_every_time() -> None:
    slow, quick = Bench(0, by_turns=True), Bench(0, kept=False, by_turns=True)
    for bench in (slow, quick):
        bench.pool.begin()
    count = FIRST + 2 * GROWS_EVERY
    drawn = slow.turns(count, seconds=0.001)
    assert drawn == quick.turns(count, seconds=3.0)
    assert len(slow.pool.taken) == FIRST + 2
    assert list(slow.pool.taken) == list(islice(in_order(domain(), 0), FIRST + 2))
    other = Bench(0, by_turns=True, seed=FIRST)
    other.pool.begin()
    assert other.turns(count) != drawn


def test_what_others_were_at_when_they_ended_has_its_turn_here() -> None:
    bench = Bench(2)
    bench.pool.begin()
    bench.pool.close()
    bench.turns(400)
    assert list(bench.pool.taken) == list(islice(in_order(domain(), 0), len(bench.pool.taken)))
    assert len(bench.pool.taken) > 4


def test_a_backend_without_any_is_told_so() -> None:
    nothing: Iterator[Step] = iter(())
    with pytest.raises(ValueError, match="no configuration"):
        ConfigurationPool(nothing, [], Growth(load=lambda step: None, seed=0))


def test_a_turn_draws_from_one_configuration() -> None:
    bench = Bench()
    bench.pool.begin()
    narrowed = bench.pool.narrowed(domain(), 0)
    (configuration,) = narrowed.capabilities.configurations
    assert narrowed.dtypes == (configuration.dtype,)


# What compiles for shapes.

LAYOUTS = 3


def test_each_configuration_has_one_layout_at_first_and_more_in_turn_with_further_ones() -> None:
    order = list(in_order(domain(), 0))
    some = list(islice(steps(iter(order), LAYOUTS), FIRST + 4))
    assert some[:FIRST] == [Step(each, 1) for each in order[:FIRST]]
    assert some[FIRST:] == [Step(order[0], 2), Step(order[FIRST], 1), Step(order[1], 2), Step(order[FIRST + 1], 1)]


def test_in_the_end_all_have_all_of_them() -> None:
    few = list(in_order(domain(), 0))[: FIRST + 1]
    every = list(steps(iter(few), LAYOUTS))
    assert sorted(every) == sorted(Step(each, number) for each in few for number in (1, 2, 3))
    for each in few:
        assert [step.layouts for step in every if step.configuration == each] == [1, 2, 3]
    assert list(steps(iter(few), 0)) == [Step(each) for each in few]
    assert list(steps(iter(few[:1]), 2)) == [Step(few[0], 1), Step(few[0], 2)]


def test_layouts_are_drawn_once_they_are_ready() -> None:
    bench = Bench(2, layouts=LAYOUTS)
    stated = domain(layouts=LAYOUTS)
    bench.pool.begin()
    seen = set()
    for turn in range(400):
        (configuration,) = (capabilities := bench.pool.narrowed(stated, turn).capabilities).configurations
        assert capabilities.layouts == max(step.layouts for step in bench.steps if step.configuration == configuration)
        seen.add(capabilities.layouts)
        bench.time.now += 1.0
    assert seen == {1, 2, 3}
    assert len(bench.pool.taken) > FIRST
    assert len(set(bench.steps)) == len(bench.steps)


def test_turns_count_layouts_too() -> None:
    bench = Bench(0, by_turns=True, layouts=LAYOUTS)
    bench.pool.begin()
    bench.turns(FIRST + 2 * GROWS_EVERY)
    assert len(bench.pool.taken) == FIRST + 1
    assert sorted(bench.pool.layouts.values()) == [*[1] * FIRST, 2]


# What drawn calls still compile.


def _with_three() -> tuple[Bench, list[Configuration]]:
    """A pool of three configurations that have joined, of which drawn calls have compiled more than their share."""
    bench = Bench(3)
    bench.pool.begin()
    bench.turns(2, COMPILING)
    first, second, third, *_ = bench.pool.taken
    bench.pool.took(first, "kernel", 100.0)
    bench.pool.took(second, "kernel", 0.0)
    return bench, [first, second, third]


def test_where_drawn_calls_compile_too_much_those_that_compile_little_are_drawn_for_a_while() -> None:
    bench, (_, settled, _) = _with_three()
    assert {bench.pool.at(turn) for turn in range(20)} == {settled}
    bench.time.now += 100.0 / SHARE
    assert len({bench.pool.at(turn) for turn in range(40)}) > 2


def test_others_are_drawn_by_calls_that_are_ready() -> None:
    bench, (first, settled, third) = _with_three()
    bench.pool.ready.add(third)
    assert {bench.pool.at(turn) for turn in range(20)} == {settled, third}
    assert [bench.pool.only_ready(each) for each in (first, settled, third)] == [False, False, True]
    # Calls that were ready say nothing of new ones.
    bench.pool.took(third, "kernel", 0.0, new=False)
    assert bench.pool.only_ready(third)
    bench.pool.took(third, "kernel", 0.0)
    assert not bench.pool.only_ready(third)


def test_a_level_waits_that_would_compile() -> None:
    bench, (first, _, _) = _with_three()
    assert [bench.pool.waits(level) for level in ("kernel", "layer")] == [False, True]
    bench.pool.took(first, "layer", 0.0)
    assert not bench.pool.waits("layer")


def test_where_nothing_is_settled_it_goes_on_with_what_has_least_left() -> None:
    bench, (first, second, _) = _with_three()
    bench.pool.took(second, "kernel", 3.0)
    assert {bench.pool.at(turn) for turn in range(20)} == {second}
    bench.pool.took(first, "kernel", 2.0)
    assert {bench.pool.at(turn) for turn in range(20)} == {first}


def test_calls_of_a_layout_are_settled_until_they_compile() -> None:
    bench = Bench(2, layouts=LAYOUTS)
    bench.pool.begin()
    (first, *_) = bench.pool.taken
    bench.pool.took(first, "layer", 100.0)
    assert [bench.pool.waits(level) for level in ("kernel", "layer")] == [False, True]
    bench.pool.took(first, "kernel", 100.0)
    assert bench.pool.waits("kernel")


def test_turns_are_not_moved_by_time() -> None:
    plain, slow = Bench(0, by_turns=True), Bench(0, by_turns=True)
    for bench in (plain, slow):
        bench.pool.begin()
    slow.pool.took(slow.pool.taken[0], "kernel", 1e9)
    assert plain.turns(FIRST) == slow.turns(FIRST)
    assert not slow.pool.waits("kernel")


def test_what_there_was_no_time_for_has_a_second_turn() -> None:
    order = list(in_order(domain(), 0))
    some = list(islice(steps(iter(order), 0, again=True), FIRST + 4))
    assert some[:FIRST] == [Step(each) for each in order[:FIRST]]
    assert some[FIRST:] == [
        Step(order[0], again=True),
        Step(order[FIRST]),
        Step(order[1], again=True),
        Step(order[FIRST + 1]),
    ]
