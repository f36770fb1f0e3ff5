"""What modes that draw, run and judge a batch at a time share: sizes that grow, the tally, and the end."""

from __future__ import annotations

import abc
import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Final

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.campaign.configurations import COMPILES
from attn_fuzz.campaign.messages import Assignment, Progress, Trying
from attn_fuzz.campaign.triage import Triage
from attn_fuzz.campaign.worker import Send
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.coverage.counts import Counts
from attn_fuzz.execution.process import context_alive, lacks_memory, leave_all_memory, leave_memory
from attn_fuzz.execution.timing import now
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.oracle.examine import its_own
from attn_fuzz.reference.case import LEVELS, Case

BEAT_SECONDS: Final = 5.0
"""Silence after which a call says that there are more to come."""

REFUSED_BATCHES: Final = 60
"""A backend that has refused so many and taken none would refuse for ever."""


class _CutShort(BaseException):
    """Leaves a batch; not an Exception, so that it is not taken for a call that fails."""


@dataclasses.dataclass(frozen=True)
class Sizing:
    """How large batches are, in calls or in documents."""

    first: int
    most: int
    seconds: float
    """Batches grow until one takes so long, of processor time on a CPU, so that a busy machine's are as large as an
    idle one's: a slow kernel is asked for less than a fast one."""
    quick: int = 2
    """How many times as large the batch after one that took a quarter of that is."""


class BatchWorker(Triage, abc.ABC):
    """The state of one assignment of batches.

    Args:
        assignment: what to do.
        send: where messages go.
        longest: (queries, keys) of the longest documents of batches, in turn.
        sizing: how large batches are.
        schedule: what is asked of batches, in turn; as many as have no divisor in common with ``longest``.
    """

    def __init__(
        self,
        assignment: Assignment,
        send: Send,
        longest: Sequence[tuple[int, int]],
        sizing: Sizing,
        schedule: Sequence[Question],
    ) -> None:
        super().__init__(assignment, send)
        self.sizing, self.schedule = sizing, schedule
        self.random = Random(assignment.seed)
        self.sweeps = [Sweep(each, self.random.randrange(1 << 16)) for each in longest]
        self.sizes = {(level, place): sizing.first for level in LEVELS for place in range(len(longest))}
        self.turn, kind = 0, self.device.type
        self.domain = Domain.of(self.backend.kernel.capabilities_on(kind), kind, assignment.dtypes, aim=assignment.aim)
        """What the turn draws from."""
        self.cut_at: float | None = None
        """Seconds of compiling at which the batch that runs is cut short, if it is."""
        self.begun = 0
        """Calls that it has begun, in all of its runs."""

    # What modes differ in.

    @abc.abstractmethod
    def levels(self) -> list[str]:
        """The levels that take turns."""

    @abc.abstractmethod
    def draw(self, level: str, place: int) -> CallBatch | None:
        """The next batch of a level and a place in ``longest``; None where nothing that was drawn is taken."""

    @abc.abstractmethod
    def judge(self, batch: CallBatch, question: Question) -> Judged:
        """A batch's verdict."""

    @abc.abstractmethod
    def take(self, judged: Judged) -> None:
        """Adds a batch to the tally, and has what failed of it triaged."""

    @abc.abstractmethod
    def kind(self, case: Case) -> str:
        """What a batch is counted as."""

    @abc.abstractmethod
    def shown(self, judged: Judged, document: int) -> Case | None:
        """The case that shows a deviation of a document."""

    def schedule_of(self, level: str) -> Sequence[Question]:
        """What is asked of batches of a level, in turn."""
        return self.schedule

    def asked_of(self, level: str) -> Sequence[Question]:
        """The same, or of that what the assignment names."""
        schedule, only = self.schedule_of(level), self.assignment.asked
        return [question for question in schedule if question.asked in only] if only else schedule

    def refused_all(self) -> None:
        """Says that nothing was taken, and why."""
        self.tally.why_refused = self.most_refused()

    # What they share.

    def judged(self, batch: CallBatch, question: Question) -> Judged:
        """A batch's verdict, with the batch announced first."""
        # A single call is the case itself.
        self.send(Trying(batch.case.to_json(), batch.ends if len(batch.ends) > 1 else ()))
        judged = self.judge(batch, question)
        if judged.broken and not context_alive(self.device):
            self.end(next(iter(judged.broken.values())))
        return judged

    def soon_judged(self, batch: CallBatch, question: Question) -> Judged | None:
        """A batch's verdict, or of its first calls, where the others are still to be compiled; None where all are."""
        if not self.configurations.hurries:
            return self.judged(batch, question)
        for _ in range(2):
            self.cut_at, self.begun = self.configurations.compiling.spent + COMPILES, 0
            self.configurations.compiling.begin()
            try:
                judged = self.judged(batch, question)
                self.configurations.compiling.end()
                return judged
            except _CutShort:
                batch = batch.first(min(self.begun - 1, len(batch.ends)))
            finally:
                self.cut_at = None
        return None

    def beat(self) -> None:
        """Says now and then that calls go on: a batch of a slow kernel takes as long as many cases."""
        self.begun += 1
        self.configurations.compiling.end()
        if self.cut_at is not None and self.begun > 1 and self.configurations.compiling.spent >= self.cut_at:
            raise _CutShort
        if time.monotonic() - self.last_sent > BEAT_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Sends the tally as it is."""
        self.last_sent = time.monotonic()
        self.send(Progress(copy.deepcopy(self.tally)))
        self.tell_reached()

    def refuse(self, reason: str) -> None:
        """Counts a batch that was not taken."""
        super().refuse(reason)
        self.refusals[reason] += 1

    def batch(self, level: str, place: int, question: Question) -> None:
        """One batch, judged, and triaged where a call fails."""
        # Calls may have shown more than was known of the backend.
        self.domain = self.configurations.domain(self.turn, level)
        batch = self.draw(level, place)
        if batch is None:
            self.refuse("no call that was drawn is one that it declares to take")
            return
        started, size = now(self.device), self.sizes[level, place]
        try:
            judged = self.soon_judged(batch, question)
            leave_memory(self.device)
            taken = now(self.device) - started - self.configurations.took(ready=judged is not None)
            if judged is not None:
                self.learn(level, place, self.grown(size, taken))
                self.take(judged)
        except UnsupportedCase as refusal:
            # Rows far apart take more memory than there is just now.
            self.refuse(str(refusal))
        except Exception as error:
            if not lacks_memory(error):
                raise
            # This machine's limit, and no fault of the backend.
            leave_all_memory(self.device)
            self.sizes[level, place] = max(size // 2, 1)
            self.refuse(f"memory ran out: {error}")

    def learn(self, level: str, place: int, size: int) -> None:
        """Keeps the size of the next batch of a level and a place."""
        self.sizes[level, place] = size

    def grown(self, size: int, taken: float) -> int:
        """The size of the next batch after one that took so many seconds."""
        if taken >= self.sizing.seconds / 2:
            return size
        growth = self.sizing.quick if taken < self.sizing.seconds / 4 else 2
        return min(growth * size, self.sizing.most)

    def tally_batch(self, judged: Judged) -> None:
        """Adds the calls to the tally, each as one case."""
        tally, batch = self.tally, judged.batch
        taken = [span for index, span in enumerate(batch.spans) if index not in judged.refused]
        tally.cases += len(taken)
        tally.refused += len(judged.refused)
        self.refusals.update(judged.refused.values())
        if self.counts is not None:
            self.count_reached(judged, self.counts)
        tally.documents += sum(end - begin for begin, end in taken)
        tally.seconds = time.monotonic() - self.started
        kind = self.kind(batch.case)
        tally.by_kind[kind] = tally.by_kind.get(kind, 0) + len(taken)
        for path in judged.paths:
            tally.paths[path] = tally.paths.get(path, 0) + len(taken)
        tally.count(judged.counted)
        self.configurations.count(tally, batch.case, len(taken))
        if not judged.failing() and not judged.touched:
            self.note_largest(judged, kind)
        self.tell()

    def count_reached(self, judged: Judged, counts: Counts) -> None:
        """Counts which values of axes the calls of a batch have."""
        for reason in judged.refused.values():
            counts.refuse(reason)
        question, asked = judged.question.asked, judged.asked
        # A single call is the case itself.
        calls = (judged.batch.case,) if len(judged.batch.ends) == 1 else judged.batch.calls
        taken = [index for index in range(len(calls)) if index not in judged.refused]
        for questions, part in (
            ([question] if question else [], [index for index in taken if index < asked]),
            ([], [index for index in taken if index >= asked]),
        ):
            counts.count([calls[index] for index in part], self.assignment.mode, questions)

    def note_largest(self, judged: Judged, kind: str) -> None:
        """Keeps the largest deviations of a clean batch, and the cases that show them."""
        stated = self.backend.kernel.capabilities_on(self.device.type)
        for name, (z, document) in its_own(stated, judged.largest()).items():
            key = f"{kind} {name}"
            if z > self.tally.worst_z.get(key, -1.0) and (case := self.shown(judged, document)) is not None:
                self.tally.worst_z[key], self.tally.worst_case[key] = z, case.to_json()

    def run(self) -> None:
        """Levels, sizes and questions in turn."""
        levels, numbers = [level for level in self.levels() if self.asked_of(level)], Counter[str]()
        if not levels:
            raise ValueError(f"no batch of {self.backend.name} is asked {' or '.join(self.assignment.asked)} here")
        self.warm_up()
        while not self.turn or not self.over():
            level = self.configurations.level(levels, self.turn)
            number, schedule = numbers[level], self.asked_of(level)
            numbers[level] += 1
            # Whole schedules have no divisor in common with the sweeps; a few questions may.
            turn = number // len(self.sweeps) if self.assignment.asked else number
            self.batch(level, number % len(self.sweeps), schedule[turn % len(schedule)])
            self.turn += 1
            if not self.tally.cases and self.tally.refused > REFUSED_BATCHES:
                self.refused_all()
                break
            if self.found and self.assignment.stop_at_first:
                break
        self.finish()
