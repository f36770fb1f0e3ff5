"""The parent of a campaign: starts workers, outlives them, and loses none of their findings."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final

from attn_fuzz.campaign import new_process
from attn_fuzz.campaign.endings import cause_of_death, excuse
from attn_fuzz.campaign.inquest import Inquest, Suspect, finding_of_death
from attn_fuzz.campaign.isolated import NoDevice
from attn_fuzz.campaign.messages import (
    Assignment,
    CampaignError,
    Candidate,
    Died,
    Failed,
    Finished,
    Found,
    Message,
    Progress,
    Tally,
    Trying,
)
from attn_fuzz.campaign.plan import share_of_time
from attn_fuzz.campaign.serve import serve
from attn_fuzz.campaign.watch import Watch
from attn_fuzz.execution.process import killed_for_memory, largest_memory, share_of_processors
from attn_fuzz.execution.signals import interrupt_once
from attn_fuzz.findings.finding import Finding

HANG_SECONDS: Final = 180.0
"""Silence after which a worker counts as hung in any case: compilers of JIT backends take up to half a minute for one
case."""

SOON_SECONDS: Final = 40.0
"""The same of one that is at no compiler or import (watch.py), and was never silent for a tenth of it before."""

KILLED_SECONDS: Final = 30.0
"""In which the case of a worker that was killed from outside has to end another process, to be at fault."""

_LOOK_SECONDS: Final = 1.0
"""Between looks at silent workers, and at how much memory all of them have."""

RESTARTS: Final = 3
"""How often a worker that died is started again; every death is a finding of its own."""


@dataclasses.dataclass
class Outcome:
    """What a campaign brought, per backend."""

    tallies: dict[str, Tally]
    findings: list[Finding]
    seconds: float = 0.0
    interrupted: bool = False
    troubles: tuple[str, ...] = ()
    """What was wrong with this machine, in sentences."""
    of_assignments: tuple[tuple[Assignment, Tally], ...] = ()
    """What each brought; one that was begun again is there more than once."""


@dataclasses.dataclass
class Worker:
    """A process at work."""

    assignment: Assignment
    process: BaseProcess
    connection: Connection
    watch: Watch
    restarts: int
    place: int
    """Which of the places at a time it has taken."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    heard: float = dataclasses.field(default_factory=time.monotonic)
    longest_silence: float = 0.0
    """Seconds, of those that ended after it had begun."""
    spoke: float | None = None
    """When it was first heard of."""
    trying: Trying | None = None
    last_words: str | None = None
    candidate: Finding | None = None
    """What it is shrinking."""
    tally: Tally = dataclasses.field(default_factory=Tally)
    finished: bool = False
    memory: int = 0
    """The most that it was seen to have, in bytes."""

    def hear(self) -> None:
        """Notes that a message came."""
        now = time.monotonic()
        if self.spoke is not None and not self.watch.compiled:
            self.longest_silence = max(self.longest_silence, now - self.heard)
        self.heard = now

    def patience(self) -> float:
        """Seconds of silence after which it counts as hung."""
        soon = max(SOON_SECONDS, 10 * self.longest_silence)
        return self.watch.patience(self.process.pid, time.monotonic() - self.heard, soon, HANG_SECONDS)


class Pool:
    """Runs assignments, so many at a time.

    Args:
        assignments: what to do.
        workers: processes at a time.
        on_progress: called with all tallies by backend whenever something changed.
        on_finding: called with each finding as it arrives, so that an interruption loses none.
        seconds: wall-clock time of them all; those that have to wait for a place share what earlier ones have left.
        on_end: called with each backend once all of its assignments have ended.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        workers: int,
        on_progress: Callable[[dict[str, Tally]], None],
        on_finding: Callable[[Finding], None],
        seconds: float | None = None,
        on_end: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._waiting = deque((assignment, 0) for assignment in assignments)
        self._limit = workers
        self._on_progress, self._on_finding, self._on_end = on_progress, on_finding, on_end
        self._seconds, self._started = seconds, time.monotonic()
        self._running: list[Worker] = []
        self._done: list[Worker] = []
        self._findings: dict[tuple[str, str], Finding] = {}
        self.troubles: list[str] = []
        self._names = tuple(dict.fromkeys(assignment.backend for assignment in assignments))
        self._at_work = set(self._names)
        self._looked = -math.inf

    def _in_time(self, assignment: Assignment) -> Assignment:
        """The assignment with its share of what is left, so that starting processes does not make a campaign longer."""
        if self._seconds is None or assignment.seconds is None:
            return assignment
        known = [worker.spoke - worker.started for worker in self._done if worker.spoke is not None]
        now, planned = time.monotonic(), [each.seconds or 0.0 for each, _ in self._waiting]
        ends = [(worker.spoke or worker.started) + (worker.assignment.seconds or 0.0) for worker in self._running]
        busy = [max(end - now, 0.0) for end in ends] + [0.0] * (self._limit - 1 - len(ends))
        left = self._started + self._seconds - now
        share = share_of_time([assignment.seconds, *planned], busy, left, min(known, default=None))
        return dataclasses.replace(assignment, seconds=share)

    def _start(self, assignment: Assignment, restarts: int) -> None:
        assignment = self._in_time(assignment)
        ours, theirs = new_process.context().Pipe(duplex=False)
        place = min(set(range(self._limit)) - {worker.place for worker in self._running}, default=0)
        on_processors = assignment.device == "cpu" and max(assignment.ranks) > 1
        processors = share_of_processors(place, self._limit) if on_processors else None
        # No daemon, for those may not have the children that crash-class cases run in; run() kills what is left.
        watch = Watch(new_process.context())
        process = new_process.start(serve, (assignment, theirs, processors), {}, watch=watch)
        theirs.close()
        self._running.append(Worker(assignment, process, ours, watch, restarts, place))

    def _tallies(self) -> dict[str, Tally]:
        totals = {name: Tally() for name in self._names}
        for worker in (*self._done, *self._running):
            totals[worker.assignment.backend].add(worker.tally)
        return totals

    def _keep(self, finding: Finding) -> None:
        """One finding per backend and symptom: the smallest."""
        key = (finding.backend, finding.symptom)
        other = self._findings.get(key)
        if other is None or finding.case.tokens < other.case.tokens:
            self._findings[key] = finding
            self._on_finding(finding)

    def _keep_candidate(self, worker: Worker) -> None:
        """What a worker will not shrink any more is kept as it was drawn."""
        if worker.candidate is not None and (worker.candidate.backend, worker.candidate.symptom) not in self._findings:
            self._keep(worker.candidate)

    def _take(self, worker: Worker, message: Message) -> None:
        worker.spoke = worker.spoke or worker.heard
        match message:
            case Trying():
                worker.trying = message
            case Progress(tally) | Finished(tally):
                worker.tally = tally
                worker.finished = isinstance(message, Finished)
                self._on_progress(self._tallies())
            case Candidate(finding):
                worker.candidate = finding
            case Found(finding):
                worker.candidate = None
                self._keep(finding)
                if worker.assignment.stop_at_first:
                    self._end_others(worker)
            case Died(last_words):
                worker.last_words = last_words
            case Failed(reason):
                self.cannot(worker, reason)

    def cannot(self, worker: Worker, reason: str) -> None:
        """An assignment cannot be done, and so neither can the campaign."""
        raise CampaignError(reason)

    def _end_others(self, worker: Worker) -> None:
        """Ends what else tests a backend of which one finding is enough."""
        name = worker.assignment.backend
        self._waiting = deque(each for each in self._waiting if each[0].backend != name)
        for other in [each for each in self._running if each is not worker and each.assignment.backend == name]:
            other.process.kill()
            self._running.remove(other)
            self._done.append(other)

    def _bury(self, worker: Worker, symptom: str, how: str) -> None:
        """Turns a dead worker's last case into a finding and starts another in its place."""
        worker.process.kill()
        worker.process.join()
        self._running.remove(worker)
        self._done.append(worker)
        job, trying = worker.assignment, worker.trying
        if trying is None:
            raise CampaignError(f"the worker for {job.backend} {how} before its first case")
        self._keep_candidate(worker)
        if killed_for_memory(worker.process.exitcode if symptom == "Crashed" else None, worker.memory):
            self.troubles.append(f"the worker for {job.backend} was killed, and had filled the memory: no finding")
            return
        message = worker.last_words or f"{symptom} [runs] process: the process {how} while it ran this case"
        finding = dataclasses.replace(
            finding_of_death(job.backend, job.device, trying, symptom, message),
            cases_to_find=worker.tally.cases,
            seconds_to_find=round(time.monotonic() - worker.started, 3),
        )
        excused = excuse(worker.process.exitcode, worker.last_words or "") if symptom == "Crashed" else ""
        self._look_into(worker, finding, how, excused)
        if job.stop_at_first and (job.backend, symptom) in self._findings:
            self._end_others(worker)
        elif worker.restarts < RESTARTS:
            spent = time.monotonic() - worker.started
            seconds = None if job.seconds is None else max(job.seconds - spent, 0.0)
            cases = None if job.cases is None else max(job.cases - worker.tally.cases, 0)
            if seconds != 0.0 and cases != 0:
                again = dataclasses.replace(job, seconds=seconds, cases=cases, seed=job.seed + 7919)
                self._waiting.append((again, worker.restarts + 1))

    def _look_into(self, worker: Worker, finding: Finding, how: str, excused: str) -> None:
        """Keeps what a dead worker ran, if it was the cause; a crash is shrunk.

        Args:
            worker: that died.
            finding: of the case that it had announced.
            how: in words, it died.
            excused: what it ended with, if that is nobody's fault, most likely (``isolated.excuse``): its case is at
                fault only if it ends another process, too.
        """
        job, trying, symptom = worker.assignment, worker.trying, finding.symptom
        assert trying is not None
        said = f"the worker for {job.backend} {excused}: no finding"
        suspect = Suspect(finding, trying, sure=not excused, how=said)
        inquest = Inquest(suspect, KILLED_SECONDS if excused else HANG_SECONDS, without=job.without)
        try:
            # Hangs are too slow to shrink while others wait.
            looked_into = symptom == "Crashed" and (excused or (job.backend, symptom) not in self._findings)
            found = inquest.finding() if looked_into else finding
            if isinstance(found, str):
                self.troubles.append(found)
            else:
                self._keep(found)
        except NoDevice as trouble:
            self.troubles.append(f"the worker for {job.backend} {how}, but {trouble}: no finding")
        except KeyboardInterrupt:
            self._keep(finding if excused else inquest.suspect.finding)
            raise

    def _step(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            self._start(*self._waiting.popleft())
        ready = wait([worker.connection for worker in self._running], timeout=_LOOK_SECONDS)
        self._look_at_memory()
        for worker in list(self._running):
            if worker not in self._running:
                # Another one's finding was enough.
                continue
            if worker.connection in ready:
                worker.hear()
                try:
                    self._take(worker, worker.connection.recv())
                except (EOFError, OSError):
                    # OSError: it died in the middle of a message.
                    worker.process.join()
                    if worker.finished:
                        self._running.remove(worker)
                        self._done.append(worker)
                    else:
                        self._bury(worker, "Crashed", cause_of_death(worker.process.exitcode))
            elif (silent := time.monotonic() - worker.heard) > worker.patience():
                self._bury(worker, "Hung", f"was silent for {silent:.0f} seconds")

    def _tell_ended(self) -> None:
        """Tells of backends with nothing running or waiting any more."""
        left = {assignment.backend for assignment, _ in self._waiting}
        left |= {worker.assignment.backend for worker in self._running}
        for name in self._at_work - left:
            self._on_end(name)
        self._at_work = left

    def _look_at_memory(self) -> None:
        """Notes what workers have taken, now and then: a campaign hears from them thousands of times a second."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for worker in self._running:
            worker.memory = max(worker.memory, largest_memory(worker.process.pid))

    def _drain(self, worker: Worker) -> None:
        """Takes what a worker had said before it was ended."""
        try:
            while worker.connection.poll():
                self._take(worker, worker.connection.recv())
        except (EOFError, OSError, CampaignError):
            pass

    def run(self) -> Outcome:
        """Everything, to the end or to an interruption.

        Raises:
            CampaignError: when a worker cannot do its assignment.
        """
        self._started = started = time.monotonic()
        interrupted = False
        # A scheduler's SIGTERM ends a campaign as Ctrl-C does: with everything that was found until then.
        before = signal.signal(signal.SIGTERM, interrupt_once)
        try:
            try:
                while self._waiting or self._running:
                    self._step()
                    self._tell_ended()
            except KeyboardInterrupt:
                interrupted = True
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                for worker in self._running:
                    worker.process.kill()
            for worker in self._running:
                self._drain(worker)
                self._keep_candidate(worker)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        tallies = self._tallies()
        seconds = time.monotonic() - started
        each = tuple((worker.assignment, worker.tally) for worker in (*self._done, *self._running))
        return Outcome(tallies, list(self._findings.values()), seconds, interrupted, tuple(self.troubles), each)
