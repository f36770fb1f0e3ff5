"""One worker: Hypothesis draws cases for one backend until the time or the number is used up; what fails is shrunk."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import torch
from hypothesis.errors import Flaky, HypothesisException

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.known import KnownIssue, crash_issue_of
from attn_fuzz.campaign.configurations import Configurations
from attn_fuzz.campaign.isolated import Isolated, NoDevice, Subject
from attn_fuzz.campaign.messages import (
    Assignment,
    Candidate,
    Covered,
    Died,
    Failed,
    Finished,
    Found,
    Message,
    Progress,
    Tally,
    Trying,
)
from attn_fuzz.coverage.axes import ASKED, probe_name
from attn_fuzz.coverage.counts import Counts
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.process import (
    DEAD_CONTEXT,
    context_alive,
    leave_all_memory,
    set_up_process,
    states_no_cause,
)
from attn_fuzz.findings.finding import Finding, summarise
from attn_fuzz.generation.drawing import few_cases
from attn_fuzz.generation.strategies import straddling
from attn_fuzz.oracle.checks import PROBES, Check
from attn_fuzz.oracle.examine import Verdict, examine, some_probes, tried
from attn_fuzz.oracle.explain import suggestion
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.oracle.symptoms import Crashed, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reduction.smallest import smallest
from attn_fuzz.reference.case import Case

Send = Callable[[Message], None]

_PROGRESS_EVERY: Final = 0.2
_REACHED_EVERY: Final = 2.0
_SHRINK_SECONDS: Final = 8.0
"""Hypothesis alone would shrink for up to five minutes; minimise() takes over where it is stopped."""

REFUSALS: Final = 500
"""A backend that has refused so many and taken none would refuse for ever."""

_ISOLATED_CASES: Final = 2
"""Cases per crash-class known issue and worker."""

_ISOLATED_SECONDS: Final = 60.0


class _Stop(BaseException):
    """Leaves Hypothesis's engine; not an Exception, so that it is not taken for a failing case."""


class _Broken(BaseException):
    """Leaves Hypothesis's engine, a mistake of ours its cause: shrunk as a failing case is, it could be missed."""


class Worker:
    """The state of one assignment."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        self.assignment, self.send = assignment, send
        stated = registry.narrowed(registry.load(assignment.backend), assignment.without)
        self.configurations = Configurations(assignment, stated, self.compile)
        self.backend = self.configurations.backend
        self.device = torch.device(assignment.device)
        self.started = time.monotonic()
        self.tally = Tally()
        self.found = set(assignment.found)
        self.only = tuple(ASKED[name] for name in assignment.asked if assignment.mode == "case")
        self.last_sent = 0.0
        self.counts = Counts() if assignment.counts else None
        self.last_told = time.monotonic()
        self.failure: tuple[Case, Verdict] | None = None
        self.original: Case | None = None
        self.failed_at = 0.0
        self.refusals: Counter[str] = Counter()
        self.isolated: dict[str, int] = {}
        self.simplest: dict[str, Case] = {}
        """By level: the case that every run of Hypothesis begins with, unless its strategy forbids it."""
        self.run_begins = False

    def examine(
        self,
        case: Case,
        poisons: Sequence[str] | None = None,
        probes: Sequence[Check] = PROBES,
        *,
        hasty: bool = False,
    ) -> Verdict:
        """A verdict, with the case announced first; under the assignment's poisons unless others are given."""
        poisons = poisons or self.assignment.poisons
        return self.announced(
            case, lambda: examine(case, self.backend, self.device, poisons, probes=probes, hasty=hasty)
        )

    def compile(self, case: Case) -> None:
        """Runs a case once, whatever comes of it: something may be compiled for it."""
        self.announced(case, lambda: tried(case, self.backend, self.device))

    def announced(self, case: Case, judge: Callable[[], Verdict]) -> Verdict:
        """A verdict, with the case announced first."""
        self.send(Trying(case.to_json()))
        try:
            verdict = self.configurations.timed(judge)
        except (torch.OutOfMemoryError, MemoryError) as error:
            # This machine's limit, and no fault of the backend.
            leave_all_memory(self.device)
            raise UnsupportedCase(f"memory ran out: {error}") from None
        if isinstance(first := verdict.first, Crashed) and (self.doubts(str(first)) or not context_alive(self.device)):
            # Everything after this would fail too, or might.
            self.end(str(first))
        return verdict

    def doubts(self, said: str) -> bool:
        """Whether a call may have failed for what others do to the device; not once other processes have found it."""
        return states_no_cause(said) and Crashed.__name__ not in self.found

    def end(self, said: str) -> NoReturn:
        """Ends this process; the parent looks into what was announced last, and asks others first where in doubt."""
        self.send(Died(said))
        os._exit(DEAD_CONTEXT)

    def over(self) -> bool:
        """Whether time or number is used up."""
        job = self.assignment
        return (job.seconds is not None and time.monotonic() - self.started >= job.seconds) or (
            job.cases is not None and self.tally.cases >= job.cases
        )

    def count(self, case: Case, verdict: Verdict) -> None:
        """Adds a case to the tally."""
        tally = self.tally
        tally.cases += 1
        tally.documents += len(case.packed_lengths)
        tally.straddling += case.level == "layer" and straddling(case)
        tally.seconds = time.monotonic() - self.started
        kind = f"{case.level} {case.dtype}"
        tally.by_kind[kind] = tally.by_kind.get(kind, 0) + 1
        for path in verdict.paths:
            tally.paths[path] = tally.paths.get(path, 0) + 1
        for name, counts in verdict.histograms.items():
            tally.count_elements(f"{case.dtype} {name}", counts)
        for issue in verdict.known:
            tally.known[issue] = tally.known.get(issue, 0) + 1
        tally.count(verdict.counted)
        if not verdict.symptoms and not verdict.known:
            for name, z in verdict.worst_z.items():
                key = f"{kind} {name}"
                if z > tally.worst_z.get(key, -1.0):
                    tally.worst_z[key], tally.worst_case[key] = z, case.to_json()
        self.configurations.count(tally, case)
        if self.counts is not None:
            # A case that fails at once is asked nothing more.
            probes = () if verdict.symptoms else some_probes(case, self.only)
            self.counts.count([case], "case", [probe_name(probe) for probe in probes if probe in PROBES])
        if time.monotonic() - self.last_sent > _PROGRESS_EVERY:
            self.last_sent = time.monotonic()
            self.send(Progress(copy.deepcopy(tally)))
            self.tell_reached()

    def tell_reached(self, *, now: bool = False) -> None:
        """Tells what was reached, where that is asked for and it is time to, or now."""
        if self.counts is not None and (now or time.monotonic() - self.last_told > _REACHED_EVERY):
            self.last_told = time.monotonic()
            if reached := self.counts.take():
                self.send(Covered(reached))

    def refuse(self, reason: str) -> None:
        """Counts a draw that was not taken."""
        self.tally.refused += 1
        if self.counts is not None:
            self.counts.refuse(reason)

    def test(self, case: Case) -> None:
        """One drawn case; raises its symptom, once per type."""
        shrinking = self.failure is not None
        if shrinking and time.monotonic() - self.failed_at > _SHRINK_SECONDS:
            raise _Stop
        if not shrinking and self.over():
            raise _Stop
        if not shrinking and self.begun_before(case):
            return
        try:
            verdict = self.examine(case, probes=PROBES if shrinking else some_probes(case, self.only))
        except UnsupportedCase as refusal:
            if not shrinking and (issue := self.only_isolated(case)) is not None:
                self.try_isolated(case, issue)
                return
            self.refusals[str(refusal)] += 1
            if not shrinking:
                self.refuse(str(refusal))
            return
        except Exception as error:
            raise _Broken from error
        if not shrinking:
            self.count(case, verdict)
        symptom = verdict.first
        if symptom is None:
            return
        if type(symptom).__name__ in self.found:
            self.tally.repeated += not shrinking
            return
        if self.failure is None:
            self.original, self.failed_at = case, time.monotonic()
            self.failure = (case, verdict)
            self.send(Candidate(self.finding(case, verdict)))
        elif type(symptom) is type(self.failure[1].first):
            self.failure = (case, verdict)
        raise symptom

    def most_refused(self) -> str:
        """What the backend has refused most often."""
        return self.refusals.most_common(1)[0][0]

    def begun_before(self, case: Case) -> bool:
        """Whether an earlier run of Hypothesis began with the same case."""
        begins, self.run_begins = self.run_begins, False
        known = case.level in self.simplest
        return begins and self.simplest.setdefault(case.level, case) == case and known

    def only_isolated(self, case: Case) -> KnownIssue | None:
        """The crash-class issue that is the only reason to refuse a case, if there is one."""
        if dataclasses.replace(self.backend, isolated=True).refusal(case, self.device.type) is not None:
            return None
        return crash_issue_of(self.backend.name, self.device.type, case, registry.calls_of(case))

    def try_isolated(self, case: Case, issue: KnownIssue) -> None:
        """A case that is known to end its process, in another one; the first few only, for each costs a process."""
        tried = self.isolated.get(issue.id, 0)
        if tried >= _ISOLATED_CASES:
            self.refuse(f"what is known to end its process ({issue.id})")
            return
        self.isolated[issue.id] = tried + 1
        self.send(Progress(copy.deepcopy(self.tally)))
        child = Isolated(Subject(self.backend.name, str(self.device), self.assignment.without), _ISOLATED_SECONDS)
        try:
            symptom = child.symptom(case)
        except NoDevice:
            self.tally.refused += 1
            return
        finally:
            child.close()
        self.tally.cases += 1
        self.tally.known[issue.id] = self.tally.known.get(issue.id, 0) + (symptom is not None)

    def round(self, level: str, number: int) -> None:
        """One Hypothesis run of a level."""
        job, domain = self.assignment, self.configurations.domain(number, level)
        self.failure = self.original = None
        self.run_begins = True
        before = self.tally.cases + self.tally.refused
        try:
            few_cases(level, domain, job.seed * 1_000_003 + number, self.test, shrink=True)
        except (Symptom, Flaky, HypothesisException, ExceptionGroup, _Stop):
            if self.failure is None and not self.over():
                raise
        except _Broken as broken:
            raise broken.__cause__ or broken from None
        self.configurations.took()
        if self.failure is not None:
            self.report(*self.failure)
        elif self.tally.cases + self.tally.refused == before:
            # There is nothing else to draw: so it counts.
            self.simplest.pop(level, None)

    def report(self, case: Case, verdict: Verdict) -> None:
        """Shrinks a failing case to the end and sends it."""
        trial = Trial(case, self.backend, self.device, self.assignment.poisons)
        small = smallest(trial, verdict, self.examine)
        name = small.symptom.__name__
        self.found |= {name} if small.first is None else {name, small.first[0]}
        finding = dataclasses.replace(self.finding(small.case, small.verdict), symptom=name)
        said = suggestion(trial, small.case, lambda each: self.send(Trying(each.to_json())))
        # Second, for of many messages few are shown.
        first, *others = finding.messages
        messages = (first, *([] if said is None else [said]), *others, *small.notes())
        self.send(Found(dataclasses.replace(finding, messages=messages)))

    def finding(self, case: Case, verdict: Verdict) -> Finding:
        """The finding of a case that failed."""
        assert self.original is not None
        return Finding(
            backend=self.backend.name,
            device=str(self.device),
            symptom=type(verdict.first).__name__,
            **summarise(verdict),
            case=case,
            original_case=self.original,
            cases_to_find=self.tally.cases,
            seconds_to_find=round(self.failed_at - self.started, 3),
            environment=environment(str(self.device)),
        )

    def warm_up(self) -> None:
        """Has the first configuration of a compiling backend compiled; that is not part of the assignment's time."""
        if self.configurations.begin():
            self.tally.warm_up_seconds = time.monotonic() - self.started
            self.started = time.monotonic()

    def run(self) -> None:
        """All rounds, levels in turn."""
        levels = [level for level in self.assignment.levels if level in self.backend.levels]
        if not levels:
            raise ValueError(f"{self.backend.name} has no {' or '.join(self.assignment.levels)} level")
        self.warm_up()
        number = 0
        while not self.over():
            self.round(levels[number % len(levels)], number)
            number += 1
            if self.found and self.assignment.stop_at_first:
                break
            if not self.tally.cases and self.tally.refused > REFUSALS:
                raise ValueError(
                    f"{self.backend.name} refused all {self.tally.refused} cases, most with: {self.most_refused()}"
                )
        self.finish()

    def finish(self) -> None:
        """Tells all that is left to tell."""
        self.tally.seconds = time.monotonic() - self.started
        self.tell_reached(now=True)
        self.send(Finished(self.tally))


def work(assignment: Assignment, send: Send, how: type[Worker] = Worker) -> None:
    """Does an assignment, sending messages as it goes. What cannot be done is a ``Failed`` message."""
    set_up_process(assignment.device)
    try:
        worker = how(assignment, send)
        try:
            worker.run()
        finally:
            worker.configurations.close()
    except (LookupError, ValueError, ReferencesDisagree) as error:
        send(Failed(str(error)))
