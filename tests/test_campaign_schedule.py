"""Who works next: what is behind, then what is interesting."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest

from attn_fuzz.nights.schedule import (
    COMPILED_SHARE,
    COMPILED_TIMES,
    MODE_SHARES,
    NEGLECTED,
    Round,
    Standing,
    Target,
    is_near_miss,
)

RATES = {"fast": 400.0, "usual": 150.0, "other": 120.0, "steady": 100.0, "slow": 20.0}
"""Cases a second of a batch of kernel calls."""

OF_MODE = {"batch": 1.0, "case": 0.05, "packed": 0.01}


def everything() -> dict[Target, Standing]:
    """Backends of very different speed, and two that compile."""
    found = {
        Target(backend, "cuda", level, mode): Standing()
        for backend in RATES
        for mode in MODE_SHARES
        for level in ("kernel", "layer")
    }
    return found | {Target(name, "cuda", "kernel", "case", True): Standing() for name in ("jit", "graphs")}


def rate_of(target: Target) -> float:
    return 0.1 if target.compiled else RATES[target.backend] * OF_MODE[target.mode]


def night(standings: dict[Target, Standing], rounds: int, count: int = 32, seconds: float = 10.0) -> list[Target]:
    """So many rounds; all slices."""
    chosen = []
    for _ in range(rounds):
        for target in Round(standings, seconds).slices(count):
            chosen.append(target)
            taken = seconds * (COMPILED_TIMES if target.compiled else 1.0)
            standings[target].note(int(rate_of(target) * taken), taken, findings=0, fresh=0, worst_z=3.0)
    return chosen


def of(standings: dict[Target, Standing], **wanted: object) -> list[Standing]:
    return [
        each for target, each in standings.items() if all(getattr(target, k) == value for k, value in wanted.items())
    ]


def test_no_backend_is_far_behind_however_slow() -> None:
    standings = everything()
    night(standings, 8)
    for mode in MODE_SHARES:
        cases = [sum(each.cases for each in of(standings, backend=name, mode=mode)) for name in RATES]
        assert min(cases) >= statistics.median(cases) / 5, mode


def test_what_is_slow_in_all_modes_catches_up_once_it_is_known_to_be() -> None:
    """By what gives it most verdicts, while everything else has its first turns."""
    slow = [Target("slow", "cuda", "kernel", mode) for mode in MODE_SHARES]
    standings = {target: Standing(cases=cases, seconds=10.0) for target, cases in zip(slow, (30, 5, 1), strict=True)}
    for name in ("fast", "usual", "other", "steady"):
        standings |= {Target(name, "cuda", "kernel", mode): Standing(cases=900.0, seconds=10.0) for mode in MODE_SHARES}
        # Without a turn so far.
        standings |= {Target(name, "cuda", "layer", mode): Standing() for mode in MODE_SHARES}
    chosen = Round(standings, 10.0).slices(12)
    assert chosen.count(slow[0]) == 6
    assert sum(target.level == "layer" for target in chosen) == 6
    # Not for ever: it has four times an equal share at most, and rests once it is no longer far behind.
    for target in slow:
        standings[target].seconds = 400.0
    assert not set(slow) & set(Round(standings, 10.0).slices(12))
    for target in slow:
        standings[target] = Standing(cases=2 * NEGLECTED * 900.0, seconds=10.0)
    assert not set(slow) & set(Round(standings, 10.0).slices(12))


def test_more_time_is_no_help_to_what_comes_to_no_verdict() -> None:
    stuck, slow, quick = (Target(name, "cuda", "kernel", "case") for name in ("stuck", "slow", "quick"))
    new = Target("quick", "cuda", "layer", "case")
    standings = {stuck: Standing(seconds=10.0), slow: Standing(cases=10.0, seconds=10.0)}
    standings |= {quick: Standing(cases=900.0, seconds=10.0), new: Standing()}
    # The median is that of `slow`; so one more that is fast.
    standings |= {Target("other", "cuda", "kernel", "case"): Standing(cases=900.0, seconds=10.0)}
    standings |= {Target("usual", "cuda", "kernel", "case"): Standing(cases=900.0, seconds=10.0)}
    assert Round(standings, 10.0).slices(2) == [slow, new]


def test_everything_has_its_turn_before_anything_has_two() -> None:
    standings = everything()
    first = night(standings, 1, count=len(standings))
    assert {target for target in standings if not target.compiled} <= set(first)


def test_the_first_slices_are_of_as_many_backends_as_there_are() -> None:
    chosen = [target.backend for target in night(everything(), 1, count=9) if not target.compiled]
    assert set(chosen[: len(RATES)]) == set(RATES)


def test_modes_share_the_time_and_compiling_backends_have_their_own() -> None:
    standings = everything()
    night(standings, 12)
    spent = {mode: sum(each.seconds for each in of(standings, mode=mode, compiled=False)) for mode in MODE_SHARES}
    for mode, share in MODE_SHARES.items():
        assert spent[mode] / sum(spent.values()) == pytest.approx(share, abs=0.05)
    compiled = sum(each.seconds for each in of(standings, compiled=True))
    assert 0 < compiled <= COMPILED_SHARE * (compiled + sum(spent.values()))


def test_one_worker_comes_to_compiling_backends_too() -> None:
    standings = everything()
    chosen = night(standings, 40, count=1)
    assert 0 < sum(target.compiled for target in chosen) < 15


def test_a_campaign_goes_on_with_what_was_behind() -> None:
    standings = everything()
    for target, standing in standings.items():
        if target.backend != "other":
            standing.cases, standing.seconds = 1e6, 1e4
    assert {target.backend for target in Round(standings, 10.0).slices(4) if not target.compiled} == {"other"}


def test_findings_near_misses_and_what_is_new_are_looked_at_again() -> None:
    for note in (
        {"findings": 1, "fresh": 0, "worst_z": 3.0},
        {"findings": 0, "fresh": 0, "worst_z": 8.0},
        {"findings": 0, "fresh": 60, "worst_z": 3.0},
    ):
        standings = everything()
        night(standings, 6)
        interesting = next(target for target in standings if target.backend == "fast" and target.mode == "batch")
        # It has had more than any other.
        standings[interesting].note(100_000, 10.0, **note)  # type: ignore[arg-type]
        assert interesting in Round(standings, 10.0).slices(16)
        for _ in range(60):
            standings[interesting].note(100_000, 10.0, findings=0, fresh=0, worst_z=3.0)
        assert Round(standings, 10.0).slices(16).count(interesting) <= 1


@pytest.mark.parametrize(
    ("z", "earlier", "near"),
    [(8.0, [4.0] * 9, True), (4.5, [2.0] * 9, False), (6.0, [5.8] * 9, False), (9.0, [], False)],
)
def test_a_near_miss_is_beyond_what_is_usual(z: float, earlier: list[float], near: bool) -> None:
    assert is_near_miss(z, earlier) is near


def test_all_gpus_have_work_in_each_round() -> None:
    standings = {
        Target(backend, f"cuda:{number}", level, "batch"): Standing()
        for number in range(8)
        for backend in RATES
        for level in ("kernel", "layer")
    }
    for _ in range(3):
        chosen = Round(standings, 10.0).slices(16)
        assert Counter(target.device for target in chosen) == {f"cuda:{number}": 2 for number in range(8)}
        for target in chosen:
            standings[target].note(100, 10.0, findings=0, fresh=0, worst_z=3.0)


def test_what_cannot_run_rests_and_is_tried_again() -> None:
    standings = everything()
    for target, standing in standings.items():
        if target.backend == "fast":
            standing.failed()
    assert "fast" not in {target.backend for target in Round(standings, 10.0).slices(60)}
    for standing in standings.values():
        standing.resting = 0
    assert "fast" in {target.backend for target in Round(standings, 10.0).slices(60)}
    assert Round({}, 10.0).slices(5) == []


def test_a_round_that_goes_on_is_planned_anew_by_what_came_of_its_slices() -> None:
    """A slice that hangs or compiles keeps a round going for minutes: what is slow is not known before its first."""
    slow, quick, other = (Target(name, "cuda", "kernel", "batch") for name in ("slow", "quick", "other"))
    standings = {slow: Standing(), quick: Standing(), other: Standing()}
    begun = Round(standings, 10.0).slices(3)
    assert set(begun) == set(standings)
    # By the first plan all of them are alike; by what came of five seconds of each, one is far behind.
    known = {target: standings[target].foreseen(cases, 5.0, 10.0) for target, cases in ((slow, 4), (quick, 800))}
    known[other] = standings[other].foreseen(700, 20.0, 10.0)
    assert (known[slow].cases, known[slow].seconds) == (8.0, 10.0)
    assert (known[other].cases, known[other].seconds) == (700.0, 20.0)
    assert Round(known, 10.0, begun=begun).slices(1) == [slow]
    # What waits for a place counts as done.
    assert Round(known, 10.0, begun=begun, waiting=[slow] * 90).slices(1) == [other]


def test_where_there_is_little_time_nothing_that_compiles_begins() -> None:
    standings = everything()
    night(standings, 1, count=len(standings))
    for target in of_compiled(standings):
        standings[target] = Standing()
    assert any(target.compiled for target in Round(standings, 10.0).slices(9))
    assert not any(target.compiled for target in Round(standings, 10.0).slices(9, quick_only=True))
    only = {target: standings[target] for target in of_compiled(standings)}
    assert Round(only, 10.0).slices(1, quick_only=True)


def of_compiled(standings: dict[Target, Standing]) -> list[Target]:
    return [target for target in standings if target.compiled]


def test_what_is_silent_gets_no_more_of_a_round() -> None:
    hanging, other = (Target(name, "cpu", "kernel", "batch") for name in ("hanging", "other"))
    plan = Round({hanging: Standing(cases=1.0, seconds=9.0), other: Standing(cases=99.0, seconds=9.0)}, 8.0)
    assert plan.slices(1) == [hanging]
    plan.leave_out(hanging)
    assert plan.slices(3) == [other] * 3
    plan.leave_out(other)
    # There is nothing else.
    assert plan.slices(1) == [other]
