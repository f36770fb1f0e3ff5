"""The second opinion: where the harness's references disagree no backend is accused, and it is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.campaign.isolated import Isolated, Report, Subject, report_of
from attn_fuzz.campaign.messages import Assignment, Failed, Found, Message, Trying
from attn_fuzz.campaign.triage import Triage
from attn_fuzz.campaign.worker import work
from attn_fuzz.oracle import examine as examining
from attn_fuzz.oracle import second_opinion
from attn_fuzz.oracle import trial as trials
from attn_fuzz.oracle.checks import exact
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.known_answer import every_row
from attn_fuzz.oracle.second_opinion import ReferencesDisagree, confirm_call
from attn_fuzz.oracle.symptoms import NotExact, Symptom, WrongOutput
from attn_fuzz.reference import batched
from attn_fuzz.reference.answer import KERNEL_TENSORS, Expected, Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from tests.commandline import Run, sentence, write

CPU = torch.device("cpu")
CASE = Case(level="kernel", lengths=(3, 2), key_lengths=(3, 4), heads=2, head_dim=4)
FAULTY = "fault:M51-swapped"

Change = Callable[[Expected], Expected]


def wrong_value(expected: Expected) -> Expected:
    """One number of an answer is off."""
    value = expected.value.clone()
    value.flatten()[-1] += 1.0
    return dataclasses.replace(expected, value=value)


def slightly_wrong_value(expected: Expected) -> Expected:
    """One number is off by far more than float64 loses, and by no more than a correct kernel may be."""
    value = expected.value.clone()
    value.flatten()[-1] += 0.1 * expected.variance.flatten()[-1].sqrt()
    return dataclasses.replace(expected, value=value)


def wrong_budget(expected: Expected) -> Expected:
    """One element is allowed next to nothing."""
    variance = expected.variance.clone()
    variance.flatten()[-1] *= 1e-20
    return dataclasses.replace(expected, variance=variance)


def broken(monkeypatch: pytest.MonkeyPatch, name: str, change: Change) -> None:
    """A mistake in the vectorised reference."""
    correct = batched.kernel_answer

    def answer(case: Case, inputs: Inputs, profile: Profile, *, degrees: bool = True) -> dict[str, Expected]:
        found = correct(case, inputs, profile, degrees=degrees)
        return {**found, name: change(found[name])}

    monkeypatch.setattr(batched, "kernel_answer", answer)
    monkeypatch.setattr(trials, "kernel_answer", answer)


@pytest.mark.parametrize("name", KERNEL_TENSORS)
@pytest.mark.parametrize("change", [wrong_value, wrong_budget])
def test_a_mistake_of_the_harness_accuses_no_backend(
    name: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, name, change)
    with pytest.raises(ReferencesDisagree, match=f"two references disagree, so that no backend is accused.*{name} at"):
        examine(CASE, registry.load("loop"), "cpu")
    monkeypatch.setattr(examining, "confirm", lambda trial, symptoms: None)
    # It is the second opinion that makes the difference.
    assert examine(CASE, registry.load("loop"), "cpu").symptoms


def test_a_row_that_only_the_vectorised_reference_takes_for_dead_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(expected: Expected) -> Expected:
        value, variance = expected.value.clone(), expected.variance.clone()
        value[0], variance[0] = 0, 0
        return dataclasses.replace(expected, value=value, variance=variance)

    broken(monkeypatch, "dk", dead)
    with pytest.raises(ReferencesDisagree):
        examine(CASE, registry.load("loop"), "cpu")


def test_the_every_row_probe_has_its_own_answer_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = batched.answers

    def answers(*arguments: Any, **options: Any) -> Iterator[batched.Chunk]:
        for chunk in correct(*arguments, **options):
            yield dataclasses.replace(chunk, expected={**chunk.expected, "dv": wrong_value(chunk.expected["dv"])})

    # The case's own answer is right: what is wrong shows where the probe's inputs are asked for.
    own = batched.kernel_answer
    broken(monkeypatch, "dv", wrong_value)
    monkeypatch.setattr(trials, "kernel_answer", own)
    monkeypatch.setattr(every_row, "answers", answers)
    with pytest.raises(ReferencesDisagree, match="dv at"):
        examine(CASE, registry.load("loop"), "cpu", probes=(exact.rows_counted,))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Cases for which the second opinion is asked."""
    cases: list[Case] = []
    pure = second_opinion.one_by_one

    def noted(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Expected]:
        cases.append(case)
        return pure(case, inputs, profile)

    monkeypatch.setattr(second_opinion, "one_by_one", noted)
    return cases


def test_faults_are_accused_as_ever(asked: list[Case]) -> None:
    verdict = examine(CASE, registry.load(FAULTY), "cpu")
    assert "budget" in verdict.checks
    assert asked == [CASE]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"values": "large", "softcap": 2.0}, {"values": "tiny", "window": (1, 0)}])
def test_the_references_agree(dtype: str, options: dict[str, object]) -> None:
    case = CASE.replace(lengths=(3, 0, 40, 7), key_lengths=(3, 5, 41, 2), dtype=dtype, **options)
    for backend in ("loop", "backup"):
        confirm_call(case, WrongOutput, registry.load(backend).kernel.profile_on("cpu"), CPU)


def test_what_is_right_costs_no_second_opinion(asked: list[Case]) -> None:
    assert not examine(CASE, registry.load("loop"), "cpu").symptoms
    assert asked == []


def test_a_campaign_says_so_and_has_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "out", lambda expected: wrong_value(expected) if expected.value.numel() else expected)
    messages: list[Message] = []
    work(Assignment(backend="loop", device="cpu", seed=0, cases=40, levels=("kernel",)), messages.append)
    assert {type(message) for message in messages} <= {Trying, Failed}
    last = messages[-1]
    assert isinstance(last, Failed)
    assert "two references disagree" in last.reason


def test_replay_ends_with_one_sentence(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "out", wrong_value)
    write("case.json", CASE.to_json())
    done = attn_fuzz("replay", "case.json", "--backend", "loop", "--device", "cpu")
    assert "two references disagree" in sentence(done)


def test_another_process_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "out", wrong_value)
    report = report_of(CASE, Subject("loop", "cpu"), registry.load("loop"))
    assert report.symptom is None
    assert report.disagreement is not None

    class Told:
        def send(self, message: object) -> None: ...

        def poll(self, timeout: float) -> bool:
            return True

        def recv(self) -> Report:
            return report

    child = Isolated(Subject("loop", "cpu"), 1.0)
    monkeypatch.setattr(child, "_process", object())
    monkeypatch.setattr(child, "_watch", object())
    monkeypatch.setattr(child, "_connection", Told())
    with pytest.raises(ReferencesDisagree, match="two references disagree"):
        child.symptom(CASE)


@pytest.mark.parametrize(
    ("case", "symptom", "reported"),
    [(CASE, WrongOutput, False), (CASE, NotExact, True), (Case(lengths=(3,)), WrongOutput, True)],
)
def test_what_was_judged_among_others_is_asked_about_too(
    case: Case, symptom: type[Symptom], reported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it rests on the vectorised answer to a kernel case."""
    broken(monkeypatch, "dq", slightly_wrong_value)
    messages: list[Message] = []
    triage = Triage(Assignment(backend="loop", device="cpu", seed=0, cases=1), messages.append)
    triage.note_candidate(case)
    if reported:
        triage.report_as_seen(symptom, "packed", "wrong", case)
    else:
        with pytest.raises(ReferencesDisagree, match="dq at"):
            triage.report_as_seen(symptom, "packed", "wrong", case)
    assert [type(message) for message in messages] == [Found] * reported
