"""What workers die of, or fall silent for, is found out in other processes, and a kill loses one step of it."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from collections import Counter
from pathlib import Path

import pytest
from commandline import FOUND as STORED

from attn_fuzz.campaign import inquest, witnesses
from attn_fuzz.campaign.inquest import NOT_AGAIN, Inquest, Suspect, look_into, suspect_of
from attn_fuzz.campaign.isolated import NO_MEMORY, NoDevice, Report, Subject
from attn_fuzz.campaign.messages import Trying
from attn_fuzz.campaign.witnesses import Witnesses
from attn_fuzz.findings.finding import Finding
from attn_fuzz.nights import deaths
from attn_fuzz.nights.deaths import Deaths, left_behind
from attn_fuzz.reference.case import Case

CASE = Case(level="kernel", lengths=(3, 2, 9), head_dim=2)


NO_CAUSE = "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"
NO_CAUSE_IN = {"fails": 99, "failed once": 1}
"""Backends that say this, in how many of the processes that are asked."""


class Process:
    """Stands for ``Isolated``: what its backend's name says it does with documents of nine queries or more."""

    alive = True
    asked: list[tuple[str, Case]] = []  # noqa: RUF012
    subjects: list[Subject] = []  # noqa: RUF012
    slow = 0.0

    def __init__(self, subject: Subject, patience: float, soon: float) -> None:
        # It is handed to a process that is started.
        self.subject, self.patience = pickle.loads(pickle.dumps(subject)), patience
        self.number = sum(other.backend == subject.backend for other in Process.subjects)
        Process.subjects.append(subject)

    def begin(self) -> None:
        pass

    prepare = begin

    def be_patient(self, patience: float, soon: float) -> None:
        self.patience = patience

    def report(self, case: Case, *, judged: bool | None = None) -> Report:
        Process.asked.append((self.subject.backend, case))
        name = self.subject.backend
        if name == "gone":
            raise NoDevice("a new process cannot use cpu")
        if name == "unknown":
            raise LookupError("unknown backend")
        if name == "loop" and Process.slow:
            return Report("Hung", survived=False)
        if max(case.packed_lengths) >= 9 and name in ("crashes", "hangs"):
            return Report("Crashed" if name == "crashes" else "Hung", "as it does", survived=False)
        if max(case.packed_lengths) >= 9 and name in NO_CAUSE_IN and NO_CAUSE_IN[name] > self.number:
            return Report("Crashed", f"Crashed [runs] call: {NO_CAUSE}", said=NO_CAUSE)
        return Report("WrongOutput") if name == "wrong" else Report()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witnesses, "Isolated", Process)
    monkeypatch.setattr(Process, "asked", [])
    monkeypatch.setattr(Process, "subjects", [])
    monkeypatch.setattr(Process, "slow", 0.0)


def suspect(backend: str, *, sure: bool, symptom: str = "Crashed", ends: tuple[int, ...] = ()) -> Suspect:
    found = suspect_of(backend, "cpu", Trying(CASE.to_json(), ends), 0.0)
    messages = (f"{symptom} [runs] process: the process did this",)
    finding = dataclasses.replace(found.finding, symptom=symptom, messages=messages)
    return dataclasses.replace(found, finding=finding, sure=sure, how="" if sure else "it was killed from outside")


def result(asked: Suspect, known: tuple[str, ...] = ()) -> Finding | str:
    return look_into(Inquest(asked, 30.0, lambda more: None, known))


def found(asked: Suspect, known: tuple[str, ...] = ()) -> Finding:
    finding = result(asked, known)
    assert isinstance(finding, Finding)
    return finding


@pytest.mark.parametrize(("backend", "symptom"), [("crashes", "Crashed"), ("hangs", "Hung")])
@pytest.mark.parametrize("sure", [False, True])
def test_what_happens_again_is_found_and_shrunk(backend: str, symptom: str, sure: bool) -> None:
    finding = found(suspect(backend, sure=sure))
    assert (finding.symptom, finding.backend) == (symptom, backend)
    assert finding.case == Case(level="kernel", lengths=(9,), head_dim=1)
    assert finding.original_case == CASE
    assert finding.symptoms[0]["symptom"] == symptom
    assert finding.messages[0].startswith(f"{symptom} [runs] process:")
    assert Finding.from_dict(finding.to_dict()) == finding


def test_what_allocates_without_end_is_refused_memory_and_does_not_fill_the_machine() -> None:
    found(suspect("hangs", sure=False))
    assert {subject.memory for subject in Process.subjects} == {4 << 30}


def test_of_a_batch_it_is_the_call_that_does_it() -> None:
    finding = found(suspect("hangs", sure=False, ends=(1, 2, 3)))
    assert finding.original_case.lengths == (9,)
    # One call after another.
    assert [case.lengths for name, case in Process.asked[:3]] == [(3,), (2,), (9,)]


def test_what_does_not_happen_again_accuses_nobody_unless_it_is_sure() -> None:
    assert result(suspect("wrong", sure=False)) == "it was killed from outside"
    finding = found(suspect("wrong", sure=True, symptom="Hung"))
    assert (finding.symptom, finding.case, finding.messages[-1]) == ("Hung", CASE, NOT_AGAIN)


def test_a_failure_of_no_stated_cause_is_the_backends_where_two_processes_have_it() -> None:
    """As cuBLAS fails on a GPU that others have filled: in the soak `sdpa_dense_efficient` was accused of that."""
    finding = found(suspect("fails", sure=False))
    assert (finding.symptom, finding.case) == ("Crashed", Case(level="kernel", lengths=(9,), head_dim=1))
    assert finding.messages == (f"Crashed [runs] call: {NO_CAUSE}",)
    assert finding.symptoms[0]["tensor"] == "call"
    assert result(suspect("failed once", sure=False)) == "it was killed from outside"


def test_nobody_hangs_on_a_machine_that_is_as_slow_for_the_loop() -> None:
    Process.slow = 1.0
    assert result(suspect("hangs", sure=False)) == "it was killed from outside"
    # A crash has nothing to do with how fast it is.
    assert found(suspect("crashes", sure=False)).symptom == "Crashed"


def test_what_is_known_is_not_shrunk_again() -> None:
    assert result(suspect("hangs", sure=False), ("Hung",)) == ""
    assert found(suspect("hangs", sure=False), ("Crashed",)).symptom == "Hung"
    assert result(suspect("hangs", sure=True, symptom="Hung"), ("Hung",)) == ""


def test_where_nothing_can_be_asked() -> None:
    assert "a new process cannot use cpu: no finding" in str(result(suspect("gone", sure=True)))
    assert found(suspect("unknown", sure=True)).case == CASE
    assert result(suspect("unknown", sure=False)) == ""


def test_a_kill_loses_one_step() -> None:
    steps: list[Suspect] = []
    begun = suspect("hangs", sure=False)
    look_into(Inquest(begun, 30.0, steps.append))
    assert (steps[0].finding.case, steps[0].confirmed) == (CASE, True)
    assert steps[-1].finding.case.lengths == (9,)
    again = Suspect.from_dict(json.loads(json.dumps(steps[2].to_dict())))
    assert again == steps[2]
    Process.asked.clear()
    finding = found(again)
    # It goes on from the smaller case, and the call that was drawn is not asked before.
    assert (finding.case.lengths, finding.original_case) == ((9,), CASE)
    assert CASE not in [case for name, case in Process.asked if name == "hangs"]


def test_what_killed_campaigns_have_spent_on_a_case_is_not_spent_again() -> None:
    """Where one is killed each minute, two minutes of shrinking would begin anew each time."""
    steps: list[Suspect] = []
    look_into(Inquest(suspect("hangs", sure=False), 30.0, steps.append))
    assert [step.spent for step in steps] == sorted(step.spent for step in steps)
    assert steps[-1].spent > 0
    # The call that hangs is confirmed, and all time for making it smaller has gone by.
    late = dataclasses.replace(steps[0], spent=inquest.SHRINK_HANG_SECONDS)
    Process.asked.clear()
    assert found(late).case == CASE
    assert [case for name, case in Process.asked if name == "hangs"] == [CASE]


def test_slowness_that_was_taken_for_silence_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(self: Process, case: Case, *, judged: bool | None = None) -> Report:
        # Slow for all cases, and never to come back for the one that was drawn.
        silent = self.patience < 30.0 or (case == CASE and self.subject.backend == "hangs")
        return Report("Hung", "as it does", survived=False) if silent and self.subject.backend != "loop" else Report()

    monkeypatch.setattr(Process, "report", report)
    assert found(suspect("hangs", sure=False)).case == CASE
    assert result(suspect("slow", sure=False)) == "it was killed from outside"


def test_where_memory_is_full_for_a_while_a_case_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    answers = [Report(refusal=NO_MEMORY)] * 2

    class Full(Process):
        def report(self, case: Case, *, judged: bool | None = None) -> Report:
            return answers.pop() if answers else super().report(case)

    monkeypatch.setattr(witnesses, "Isolated", Full)
    asked = Witnesses("crashes", "cuda", {})
    assert asked.report(asked.another(30.0), CASE, pauses.append).symptom == "Crashed"
    assert len(pauses) == 2
    # Of a process that has a share of its own nothing will be free later.
    answers[:] = [Report(refusal=NO_MEMORY)]
    of_cpu = Witnesses("crashes", "cpu", {})
    assert of_cpu.report(of_cpu.another(30.0), CASE, pauses.append).refusal == NO_MEMORY
    assert len(pauses) == 2
    answers[:] = [Report(refusal=NO_MEMORY)] * 9
    assert asked.report(asked.another(30.0), CASE, pauses.append).refusal == NO_MEMORY


def test_the_next_process_starts_while_one_is_asked() -> None:
    asked = Witnesses("hangs", "cpu", {})
    first = asked.another(8.0)
    assert len(Process.subjects) == 2
    second = asked.another(40.0)
    assert second is not first
    # It is the one that was started before, with the patience that is wanted now.
    assert (len(Process.subjects), second.patience) == (3, 40.0)
    assert asked.loop() is asked.loop()
    assert [subject.backend for subject in Process.subjects] == ["hangs"] * 3 + ["loop"]


# Beside a campaign.


def finished(looking: Deaths) -> list[Finding | str]:
    for thread in looking._threads:
        thread.join(20.0)
    assert not looking.pending
    return list(looking.news())


def test_all_suspects_are_looked_into_and_their_notes_taken_away(tmp_path: Path) -> None:
    looking = Deaths(tmp_path)
    for backend in ("wrong", "crashes", "hangs"):
        looking.add(suspect(backend, sure=False))
    news = finished(looking)
    assert {each if isinstance(each, str) else each.symptom for each in news} == {
        "it was killed from outside",
        "Crashed",
        "Hung",
    }
    assert list(tmp_path.iterdir()) == []
    # It begins again when there is something.
    looking.add(suspect("hangs", sure=False))
    assert finished(looking) == []


def test_what_has_come_out_is_noted_until_it_is_stored(tmp_path: Path) -> None:
    looking = Deaths(tmp_path)
    looking.add(suspect("crashes", sure=True))
    looking._threads[0].join(20.0)
    (path,) = tmp_path.iterdir()
    for what in looking.news():
        assert Finding.from_dict(json.loads(path.read_text())) == what
    assert not path.exists()


def test_what_is_cut_short_is_kept_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def waits(asked: Inquest) -> Finding | str:
        begun.set()
        go_on.wait(20.0)
        return asked.suspect.finding

    monkeypatch.setattr(deaths, "look_into", waits)
    looking = Deaths(tmp_path, at_once=1)
    first, second = suspect("crashes", sure=True), suspect("hangs", sure=False)
    looking.add(first)
    looking.add(first)
    looking.add(second)
    begun.wait(20.0)
    assert looking.pending == 2
    assert looking.close() == [first.finding]
    go_on.set()
    # The next campaign looks into what is not sure.
    assert second in left_behind(tmp_path)
    assert list(looking.news()) == []


def test_what_cannot_be_looked_into_is_told_and_nothing_that_is_sure_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(asked: Inquest) -> Finding | str:
        raise TypeError("cannot pickle it")

    monkeypatch.setattr(deaths, "look_into", fails)
    looking = Deaths(tmp_path)
    looking.add(suspect("hangs", sure=False))
    looking.add(suspect("crashes", sure=True))
    told = finished(looking)
    assert [each.symptom for each in told if isinstance(each, Finding)] == ["Crashed"]
    assert [each for each in told if isinstance(each, str) and "TypeError: cannot pickle it" in each]


def test_each_backend_has_one_looked_into_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hang takes minutes of waiting: meanwhile others are looked into, and no second one of the same backend."""
    two, busy, most = threading.Barrier(2), Counter[str](), Counter[str]()

    def waits(asked: Inquest) -> Finding | str:
        name = asked.suspect.finding.backend
        busy[name] += 1
        most[name] = max(most[name], busy[name])
        two.wait(20.0)
        busy[name] -= 1
        return name

    monkeypatch.setattr(deaths, "look_into", waits)
    looking = Deaths(tmp_path, at_once=2)
    for name in ("crashes", "hangs"):
        looking.add(suspect(name, sure=True))
        looking.add(dataclasses.replace(suspect(name, sure=False), trying=Trying(CASE.to_json(), (1, 3))))
    assert sorted(map(str, finished(looking))) == ["crashes", "crashes", "hangs", "hangs"]
    assert most == {"crashes": 1, "hangs": 1}


def test_what_is_silent_again_and_again_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, order = threading.Event(), []

    def waits(asked: Inquest) -> Finding | str:
        go_on.wait(20.0)
        order.append(asked.suspect.finding.backend)
        return ""

    monkeypatch.setattr(deaths, "look_into", waits)
    looking = Deaths(tmp_path, known=[("hung", "Hung")], at_once=1)
    looking.add(suspect("first", sure=False))
    silent = [("slow", 30.0), ("hangs", 20.0), ("hangs", 20.0), ("hung", 40.0), ("hung", 40.0)]
    for number, (name, silence) in enumerate(silent):
        trying = Trying(CASE.to_json(), tuple(range(number)))
        looking.add(dataclasses.replace(suspect(name, sure=False), silence=silence, trying=trying))
    looking.add(suspect("crashes", sure=True))
    go_on.set()
    finished(looking)
    assert order == ["first", "crashes", "hangs", "slow", "hangs", "hung", "hung"]


def test_notes_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    for number, text in enumerate(("", "[]", "{", "null", '{"case": 3}', json.dumps({"finding": STORED.to_dict()}))):
        (tmp_path / f"suspect-{number}").write_text(text)
    assert list(left_behind(tmp_path)) == []
