"""From a failing case to the smallest: what is asked on the way, and what has the last word."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.evaluation.seeded_faults import find_fault
from attn_fuzz.oracle.checks import PROBES, Check
from attn_fuzz.oracle.checks.exact import needle_found
from attn_fuzz.oracle.checks.repeat import repeats_itself
from attn_fuzz.oracle.examine import Verdict, some_probes
from attn_fuzz.oracle.symptoms import Hung, NotExact, NotRepeatable, Symptom, WrongOutput
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reduction.smallest import smallest
from attn_fuzz.reference.case import Case

CASE = Case(lengths=(3, 40, 2), cuts=(20,))
CLEAN = Verdict((), {}, frozenset())


def wrong(z: float) -> Verdict:
    return Verdict((WrongOutput("budget", "out", "wrong", z=z),), {}, frozenset())


@dataclasses.dataclass
class Asked:
    """Stands for a backend: says what fails, and remembers what it was asked."""

    answer: Callable[..., Verdict]
    hasty: list[bool] = dataclasses.field(default_factory=list)
    probes: list[Sequence[Check]] = dataclasses.field(default_factory=list)

    def __call__(
        self,
        case: Case,
        poisons: Sequence[str] | None = None,
        probes: Sequence[Check] = PROBES,
        *,
        hasty: bool = False,
    ) -> Verdict:
        self.hasty.append(hasty)
        self.probes.append(tuple(probes))
        return self.answer(case, tuple(probes), hasty)


def trial(case: Case = CASE) -> Trial:
    return Trial(case, registry.load("loop"), torch.device("cpu"))


def test_layers_that_are_grossly_wrong_shrink_by_quick_budgets_and_end_by_careful_ones() -> None:
    asked = Asked(lambda case, probes, hasty: wrong(1e6) if max(case.lengths) >= 5 else CLEAN)
    small = smallest(trial(), wrong(1e6), asked)
    assert small.case.lengths == (5,)
    assert small.always
    quick = asked.hasty.index(True), len(asked.hasty) - asked.hasty[::-1].index(True)
    assert quick[0] == 1
    assert all(asked.hasty[slice(*quick)])
    # The last word, and a look at what is a token smaller by every probe.
    assert 1 < len(asked.hasty) - quick[1] < 10


def test_what_only_quick_budgets_accuse_is_shrunk_again_by_careful_ones() -> None:
    asked = Asked(lambda case, probes, hasty: wrong(1e6) if hasty or max(case.lengths) >= 5 else CLEAN)
    small = smallest(trial(), wrong(1e6), asked)
    assert small.case.lengths == (5,)
    assert small.verdict.symptoms
    assert not asked.hasty[-1]


@pytest.mark.parametrize("case", [CASE, Case(level="kernel", lengths=(3, 40, 2))], ids=["layer", "kernel"])
def test_small_errors_and_kernels_are_judged_as_ever(case: Case) -> None:
    z = 12.0 if case.level == "layer" else 1e6
    asked = Asked(lambda case, probes, hasty: wrong(z) if max(case.lengths) >= 5 else CLEAN)
    assert smallest(trial(case), wrong(z), asked).case.lengths == (5,)
    assert not any(asked.hasty)


def not_exact(probe: Check) -> Verdict:
    symptom: Symptom = NotExact("additivity", "dv", "off")
    symptom.probe = probe
    return Verdict((symptom,), {}, frozenset())


def test_what_earlier_calls_leave_behind_is_shrunk_with_the_same_calls() -> None:
    """It fails only where another probe has run before, as in the hunt and not where all of them are asked."""
    few = some_probes(CASE)
    before, probe = few[0], few[1]

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        fails = probe in probes and probes[probes.index(probe) - 1] is before and case.tokens >= 3
        return not_exact(probe) if fails and len(probes) < len(PROBES) else CLEAN

    asked = Asked(answer)
    small = smallest(trial(), not_exact(probe), asked)
    assert small.case.tokens == 3
    assert small.symptom is NotExact
    assert not small.always
    assert {probes for probes in asked.probes[2:] if probes != PROBES} == {(before, probe)}


def test_a_far_smaller_case_of_another_symptom_is_not_lost() -> None:
    """Twenty tokens show the one, three the other: the three are reported, and the twenty are in the notes."""

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        if case.tokens >= 20:
            return wrong(1e6)
        return Verdict((NotExact("additivity", "dv", "off"),), {}, frozenset()) if case.tokens >= 3 else CLEAN

    small = smallest(trial(), wrong(1e6), Asked(answer))
    assert (small.symptom, small.case.tokens) == (NotExact, 3)
    assert small.first is not None
    assert (small.first[0], small.first[1].tokens) == ("WrongOutput", 20)
    (note,) = small.notes()
    assert small.first[1].to_json() in note


def test_a_case_that_is_hardly_smaller_keeps_the_symptom_that_was_seen() -> None:
    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        if case.tokens >= 5:
            return wrong(1e6)
        return Verdict((NotExact("additivity", "dv", "off"),), {}, frozenset()) if case.tokens >= 3 else CLEAN

    small = smallest(trial(), wrong(1e6), Asked(answer))
    assert (small.symptom, small.case.tokens, small.first) == (WrongOutput, 5, None)
    assert small.notes() == ()


def test_what_fails_is_a_finding_though_it_is_refused_when_it_is_asked_again() -> None:
    """As of memory that another process has taken meanwhile: a worker died of that in the soak, its kernel accused."""

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        if case.tokens >= 20:
            raise UnsupportedCase("memory far_rows asks for 69 GiB, but 12 are free")
        return wrong(1e6) if case.tokens >= 4 else CLEAN

    small = smallest(trial(), wrong(1e6), Asked(answer))
    assert small.case.tokens == 4
    assert smallest(trial(), wrong(1e6), Asked(refuses)).case == CASE


def refuses(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
    raise UnsupportedCase("memory far_rows asks for 69 GiB, but 12 are free")


def test_what_comes_and_goes_is_tried_several_times() -> None:
    calls = 0

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        nonlocal calls
        calls += 1
        return wrong(1e6) if calls % 5 == 0 and case.tokens >= 4 else CLEAN

    small = smallest(trial(), wrong(1e6), Asked(answer))
    assert small.case.tokens == 4
    assert not small.always


def test_what_comes_and_goes_is_shown_by_bits_that_differ() -> None:
    """A smaller case may be right by chance, however often its budget is asked: that two runs differ is what stays."""
    seen = Counter[Case]()

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        seen[case] += 1
        if case.tokens >= 20 and seen[case] % 2:
            return wrong(1e6)
        differs = repeats_itself in probes and case.tokens >= 2
        return Verdict((NotRepeatable("repeatable", "out", "other bits"),), {}, frozenset()) if differs else CLEAN

    small = smallest(trial(), wrong(1e6), Asked(answer))
    assert (small.symptom, small.case.tokens) == (NotRepeatable, 2)


def test_what_another_probe_sees_in_a_smaller_case_is_shrunk_by_that() -> None:
    """Ten tokens leave their budget, and three of them show the same to another probe, which nothing had asked."""

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        if case.tokens >= 10:
            return wrong(1e6)
        symptom: Symptom = WrongOutput("needle", "out", "wrong")
        symptom.probe = needle_found
        return Verdict((symptom,), {}, frozenset()) if needle_found in probes and case.tokens >= 3 else CLEAN

    small = smallest(trial(), wrong(1e6), Asked(answer))
    assert (small.symptom, small.case.tokens, small.first) == (WrongOutput, 3, None)


def test_ranks_that_wait_for_ever_are_not_waited_for_again() -> None:
    hangs = Verdict((Hung("runs", "process", "no answer"),), {}, frozenset())
    waited = Counter[Case]()

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        waited[case] += case.tokens >= 4
        return hangs if case.tokens >= 4 else CLEAN

    small = smallest(trial(), hangs, Asked(answer))
    assert (small.symptom, small.case.tokens) == (Hung, 4)
    # To shrink it, and for the last word.
    assert waited[small.case] == 2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_third_gradient_off_ends_as_a_single_token_with_other_bits(seed: int) -> None:
    mark = find_fault("X08", seed, mode="batch")
    assert mark.finding is not None
    assert (mark.finding.symptom, mark.finding.case.tokens, mark.minimal) == ("NotRepeatable", 1, True)


def test_roundings_that_leave_the_budget_with_some_values_only_are_shrunk_by_what_tells_of_others() -> None:
    """Where they do no probe is asked; with other values they are within, and a probe tells after 33 tokens."""

    def answer(case: Case, probes: Sequence[Check], hasty: bool) -> Verdict:
        if case.tokens >= 200 and case.seed == 7:
            return wrong(9.0)
        return not_exact(needle_found) if case.tokens >= 33 and needle_found in probes else CLEAN

    case = Case(level="kernel", lengths=(300, 5), seed=7)
    small = smallest(trial(case), wrong(9.0), Asked(answer))
    assert (small.symptom, small.case.tokens) == (NotExact, 33)
    assert small.first is not None
    assert (small.first[0], small.first[1].tokens, small.first[1].seed) == ("WrongOutput", 200, 7)


def test_a_long_case_stays_what_it_is_where_other_values_show_no_more() -> None:
    asked = Asked(lambda case, probes, hasty: wrong(9.0) if case.tokens >= 200 and case.seed == 7 else CLEAN)
    small = smallest(trial(Case(level="kernel", lengths=(300,), seed=7)), wrong(9.0), asked)
    assert (small.symptom, small.case.tokens, small.first) == (WrongOutput, 200, None)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_output_added_up_in_half_precision_ends_at_two_tiles_of_keys(seed: int) -> None:
    mark = find_fault("X37", seed)
    assert mark.finding is not None
    assert (mark.finding.symptom, max(mark.finding.case.packed_key_lengths), mark.minimal) == ("NotExact", 33, True)
