"""One worker of the packed mode: cases of thousands of documents; what fails is cut out and shrunk."""

from __future__ import annotations

import time
from typing import Final

from attn_fuzz.batch.batch_size import affordable, bearable, masks_whole_pack, pads_to_longest
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.layer import draw_layer_case
from attn_fuzz.batch.packed import PACKED_SCHEDULE, PackedFailure, confirmed, judge_packed
from attn_fuzz.campaign.batch_worker import BatchWorker, Sizing
from attn_fuzz.campaign.call_times import CallTimes
from attn_fuzz.campaign.messages import Assignment, Trying
from attn_fuzz.campaign.worker import Send, work
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.generation.length_sweeps import LONGEST, draw_case
from attn_fuzz.generation.long_rows import LONG_WORK
from attn_fuzz.oracle.examine import USUAL_MEMORIES
from attn_fuzz.reduction.packed import bisected, candidates, plainer
from attn_fuzz.reference.case import Case

SIZING: Final = Sizing(first=64, most=16384, seconds=0.5)
"""In documents."""

BISECT_SECONDS: Final = 30.0

_GROWN: Final = 7
"""Where kernels form masks over the whole pack, one call in so many has as many documents as there is memory for; with
levels, sizes and questions in turn, it comes to all of them."""

CROWD: Final = 1100
"""Documents of a call now and then, beyond the time for one: more than 2^10, with 2^13 to 2^15 queries in them."""

_WITH_LONG_ROWS: Final = 16
"""Documents of a call where they take minutes, and one of thousands of queries is aimed at."""

# With sizes and questions in turn, crowds of all sizes come to be asked all of them.
_CROWDED, _FIRST_CROWDED = 7, 3

_BISECTIONS: Final = 3
"""A fault that no cut-out shows is bisected so often, not in every call that it spoils."""


class PackedWorker(BatchWorker):
    """The state of one assignment of packed cases, each a batch of one call."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        super().__init__(assignment, send, LONGEST[assignment.device.partition(":")[0]], SIZING, PACKED_SCHEDULE)
        self.bisections, self.kernel_calls, self.masked = 0, 0, 0
        self.times, self.kind_of_call, self.crowd_due = CallTimes(), ("", 0), False
        asked = (self.backend, self.domain, lambda case: self.send(Trying(case.to_json())))
        on_cpu = self.device.type == "cpu"
        self.masks_all = on_cpu and masks_whole_pack(*asked)
        self.pads = on_cpu and not self.masks_all and pads_to_longest(*asked)

    def levels(self) -> list[str]:
        """Those that the backend has."""
        levels = [level for level in self.assignment.levels if level in self.backend.levels]
        if not levels:
            raise ValueError(f"{self.backend.name} has no {' or '.join(self.assignment.levels)} level")
        return levels

    def draw(self, level: str, place: int) -> CallBatch | None:
        """The next case of a level and a place in ``LONGEST``."""
        case = self.draw_case(level, place)
        return None if case is None else CallBatch.of_one(case)

    def draw_case(self, level: str, place: int) -> Case | None:
        """A packed case as large as its time allows."""
        self.kind_of_call = level, place
        documents = self.sizes[level, place]
        if self.masks_all:
            most = bearable if self.masked % _GROWN == _GROWN - 1 else affordable
            documents = min(documents, most(self.sweeps[place].longest))
            self.masked += 1
        elif self.is_turn_of_crowd(level):
            crowd = self.drawn(level, place, max(documents, CROWD))
            if crowd is not None and self.has_time_for(crowd):
                self.crowd_due = False
                return crowd
        case = self.drawn(level, place, documents)
        if case is None or self.left is None:
            return case
        most_documents = self.times.most_documents(self.kind_of_call, case, self.left)
        return case if most_documents >= len(case.packed_lengths) else self.drawn(level, place, most_documents)

    def drawn(self, level: str, place: int, documents: int) -> Case | None:
        """A case of so many documents, where one is taken."""
        if level == "layer":
            longest = self.sweeps[place].longest[0]
            return draw_layer_case(self.random, self.backend, self.domain, documents, longest)
        # Where thousands of rows are masked over the whole pack, or every document is given them, it takes minutes.
        slow = self.masks_all or self.pads
        if slow and self.domain.decided("long_rows"):
            documents, slow = min(documents, _WITH_LONG_ROWS), False
        long = 0 if slow else LONG_WORK
        return draw_case(self.random, self.sweeps[place], self.backend, self.domain, documents, long=long)

    @property
    def left(self) -> float | None:
        """Seconds of the assignment; None where it has no time."""
        seconds = self.assignment.seconds
        return None if seconds is None else seconds - (time.monotonic() - self.started)

    def has_time_for(self, crowd: Case) -> bool:
        """Whether a crowd is known to take no more than half of the time that is left."""
        return self.left is None or self.times.fits(self.kind_of_call, crowd, self.left / 2)

    def is_turn_of_crowd(self, level: str) -> bool:
        """Whether a call of more documents than its size allows is due, which waits until one is known to be quick."""
        if level != "kernel" or self.device.type != "cpu":
            return False
        self.kernel_calls += 1
        self.crowd_due |= self.kernel_calls % _CROWDED == _FIRST_CROWDED
        return self.crowd_due

    def judge(self, batch: CallBatch, question: Question) -> Judged:
        """A packed case's verdict."""
        started = time.monotonic()
        judged = judge_packed(batch.case, self.backend, self.device, question, self.beat)
        self.times.note(self.kind_of_call, batch.case, time.monotonic() - started)
        return judged

    def kind(self, case: Case) -> str:
        """What a case is counted as."""
        return f"packed-{case.level} {case.dtype}"

    def shown(self, judged: Judged, document: int) -> Case | None:
        """A document by itself."""
        return subset(judged.batch.case, [document])

    def refused_all(self) -> None:
        """Nothing was taken."""
        raise ValueError(
            f"{self.backend.name} refused all {self.tally.refused} calls, most with: {self.most_refused()}"
        )

    def take(self, judged: Judged) -> None:
        """Adds a case to the tally, and has it triaged where it fails."""
        if self.refuses_layout(judged):
            self.refuse(judged.broken[0])
            return
        self.tally_batch(judged)
        if (found := self.failure_of(judged)) is not None:
            self.triage(found, judged.question)

    def failure_of(self, judged: Judged) -> PackedFailure | None:
        """What is wrong with a case under two value seeds, if anything."""
        return confirmed(judged, lambda case: self.judged(CallBatch.of_one(case), judged.question))

    def fails(self, case: Case, question: Question) -> bool:
        """Whether a packed case is taken and fails."""
        if self.backend.refusal(case, self.device.type) is not None:
            return False
        return self.failure_of(self.judged(CallBatch.of_one(case), question)) is not None

    def refuses_layout(self, judged: Judged) -> bool:
        """Whether a call fell over an unusual memory layout and does not without: a clean refusal, as elsewhere."""
        case = judged.batch.case
        if not judged.broken or case.level != "kernel" or case.memory in USUAL_MEMORIES:
            return False
        return not self.judged(CallBatch.of_one(case.replace(memory="contiguous")), judged.question).broken

    def triage(self, found: PackedFailure, question: Question) -> None:
        """Cuts a failing document out of its call and hands it to the case mode."""
        self.note_candidate(found.case)
        known: dict[str, None] = {}
        for small in candidates(found.case, found.documents):
            verdict = self.narrow(small)
            if verdict is not None and verdict.first is not None:
                self.hand_over(small, verdict)
                return
            known |= dict.fromkeys(verdict.known if verdict is not None else ())
        if known:
            self.count_known(known)
            return
        if self.bisections >= _BISECTIONS:
            self.tally.repeated += 1
            return
        self.bisections += 1

        def fails(case: Case) -> bool:
            return self.fails(case, question)

        small = bisected(found.case, fails, BISECT_SECONDS)
        # What needs many documents needs little of each, and the case mode looks at all of them every time.
        small = plainer(small, fails, BISECT_SECONDS)
        verdict = self.narrow(small)
        if verdict is not None and verdict.first is not None:
            self.hand_over(small, verdict)
        else:
            # The smallest packed call that fails, which no small case shows.
            self.report_as_seen(found.symptom, "packed", found.message, small, tensor=found.tensor)


def work_on_packed(assignment: Assignment, send: Send) -> None:
    """Does an assignment of packed cases, sending messages as it goes. What cannot be done is a ``Failed`` message."""
    work(assignment, send, PackedWorker)
