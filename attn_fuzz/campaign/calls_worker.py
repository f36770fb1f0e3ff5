"""One worker of the batch mode: batches of small kernel or layer calls; a call that fails goes to the case mode."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

from attn_fuzz.backends.kernel import Configuration
from attn_fuzz.batch.judge import SELDOM, judge, moving, schedule_on, usually_asked
from attn_fuzz.batch.judged import BY_BITS, Judged, Question, tensor_of
from attn_fuzz.batch.launched import CAPTURED
from attn_fuzz.batch.layer_judge import LAYER_SCHEDULE
from attn_fuzz.campaign.batch_worker import BatchWorker, Sizing
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.campaign.plan import batched_levels
from attn_fuzz.campaign.worker import Send, work
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.inferred import promises
from attn_fuzz.generation.calls import LONGEST, draw_batch, repeated
from attn_fuzz.generation.layer_calls import LONGEST as LAYER_LONGEST
from attn_fuzz.generation.layer_calls import MOST, draw_layer_batch
from attn_fuzz.generation.strategies import straddling
from attn_fuzz.oracle.checks import PROBES, RARE
from attn_fuzz.oracle.deviations import beyond_doubt
from attn_fuzz.oracle.symptoms import InputsChanged
from attn_fuzz.oracle.trial import SECOND_SEED
from attn_fuzz.reduction.call_sequence import CallSequence, smallest
from attn_fuzz.reference.case import Case

SIZING: Final = {
    "cuda": Sizing(first=4, most=256, seconds=2.0, quick=4),
    "cpu": Sizing(first=8, most=128, seconds=1.0, quick=8),
}
"""In calls. More of them make each cheaper, but have their configuration in common: many batches see more of those. A
call takes its share at most: what is quick may grow at once."""

_BATCHES: Final = 60
"""At least, where cases are counted and not seconds: each question comes in some of them, and configurations differ."""

_CANDIDATES: Final = 3
"""Calls of a failing batch that are looked at on their own: its victims are much alike."""

SHRINK_SECONDS: Final = 20.0
"""How long calls are left out of a batch that fails after other calls only."""

_LOOKED_AGAIN: Final = 3
"""So often the case mode looks into batches that are accused of something, and finds what it has found before: a kernel
that is wrong in most calls would have no time for others."""

_READY: Final = 8
"""Batches of each configuration that are kept, the last ones."""

_TOUCHED: Final = 64
"""Calls that are looked at on their own where something was written that may not be."""


class CallsWorker(BatchWorker):
    """The state of one assignment of batches of small calls."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        kind = assignment.device.partition(":")[0]
        super().__init__(assignment, send, LONGEST[kind], SIZING[kind], schedule_on(kind))
        self.looked_again = Counter[str]()
        self.ready: dict[Configuration, deque[tuple[CallBatch, list[int]]]] = {}
        """Of a backend that compiles, batches that have run, and which of their calls came back right."""
        if assignment.asked == ("replayed alike",):
            # Of the half that is asked no more are captured.
            self.sizing = dataclasses.replace(self.sizing, most=2 * CAPTURED)
        if assignment.asked == (SELDOM.asked,):
            # What is compiled takes most of the time, and serves any number of calls.
            self.sizing = dataclasses.replace(self.sizing, first=self.sizing.most)
            self.sizes = dict.fromkeys(self.sizes, self.sizing.most)

    def levels(self) -> list[str]:
        """Those that the backend has; of layers on one rank."""
        levels = batched_levels(
            self.backend, self.assignment.levels, self.assignment.ranks, self.assignment.tensor_ranks
        )
        if not levels:
            raise ValueError(f"{self.backend.name} has no {' or '.join(self.assignment.levels)} level here for batches")
        # Both get about the same time: a batch of kernel calls takes half of what one of layer calls does.
        return [*levels, "kernel"] if len(levels) > 1 else levels

    def schedule_of(self, level: str) -> Sequence[Question]:
        """Of layers one of their own."""
        return LAYER_SCHEDULE if level == "layer" else self.schedule

    def draw(self, level: str, place: int) -> CallBatch | None:
        """The next batch; no more calls than are still asked for. None where nothing that was drawn is taken."""
        wanted = self.sizes[level, place]
        if self.assignment.cases is not None:
            spread = max(self.assignment.cases // _BATCHES, self.sizing.first)
            wanted = min(wanted, spread, self.assignment.cases - self.tally.cases)
        if level == "layer":
            longest = LAYER_LONGEST[self.device.type][place]
            most = min(wanted, MOST[self.device.type])
            return draw_layer_batch(self.random, self.backend, self.domain, most, longest)
        if self.configurations.only_ready and (ready := self.ready_batches()):
            return repeated(self.random, *self.random.choice(ready), self.device.type, wanted)
        batch = draw_batch(self.random, self.sweeps[place], self.backend, self.domain, wanted)
        return batch.first(wanted) if batch is not None else None

    def grown(self, size: int, taken: float) -> int:
        """Whatever the last one took, where cases are counted and not seconds: a seed then draws the same each time."""
        if self.assignment.cases is not None and self.assignment.seconds is None:
            return min(self.sizing.quick * size, self.sizing.most)
        return super().grown(size, taken)

    def learn(self, level: str, place: int, size: int) -> None:
        """On a CPU, places that have had no batch begin there: what a batch may take is limited when it is drawn."""
        super().learn(level, place, size)
        if self.device.type == "cpu":
            untried = [key for key, own in self.sizes.items() if key[0] == level and own == self.sizing.first]
            self.sizes.update(dict.fromkeys(untried, size))

    def judge(self, batch: CallBatch, question: Question) -> Judged:
        """A batch's verdict."""
        return judge(batch, self.backend, self.device, question, self.beat, usually_asked(batch))

    def kind(self, case: Case) -> str:
        """What its calls are counted as."""
        return f"batch {case.dtype}" if case.level == "kernel" else f"batch-layer {case.dtype}"

    def shown(self, judged: Judged, document: int) -> Case | None:
        """The call that a document is in."""
        return judged.call(judged.call_of(document))

    def take(self, judged: Judged) -> None:
        """Adds a batch to the tally, and has what failed of it triaged."""
        if judged.batch.case.level == "layer":
            calls = enumerate(judged.batch.calls)
            self.tally.straddling += sum(straddling(call) for index, call in calls if index not in judged.refused)
        self.tally_batch(judged)
        self.keep_ready(judged)
        if judged.touched:
            self.triage_touched(judged)
        elif failing := judged.failing():
            self.triage(judged, failing)

    def ready_batches(self) -> list[tuple[CallBatch, list[int]]]:
        """Of the turn's configuration."""
        (chosen,) = self.domain.capabilities.configurations
        plain = self.configurations.plain.get(chosen)
        first = [(plain, list(range(len(plain.ends))))] if plain is not None else []
        return [*first, *self.ready.get(chosen, ())]

    def keep_ready(self, judged: Judged) -> None:
        """Keeps a batch of kernel calls, to be made again with other values while others are compiled."""
        batch = judged.batch
        if not self.configurations.hurries or batch.case.level != "kernel":
            return
        some = sorted({*range(len(batch.ends))}.difference(judged.failing(), judged.refused))
        if some:
            self.ready.setdefault(Configuration.of(batch.case), deque(maxlen=_READY)).append((batch, some))

    def handed_over(self, judged: Judged, calls: list[int]) -> bool:
        """Whether the case mode fails one of these calls, or explains it: a known issue, or a refused layout."""
        known: dict[str, None] = {}
        refused, probes = False, (*PROBES, *RARE) if judged.question == SELDOM else PROBES
        for index in calls:
            small = judged.call(index)
            verdict = self.narrow(small, probes)
            if verdict is not None and verdict.first is not None:
                self.note_candidate(small)
                self.hand_over(small, verdict)
                return True
            # An error about an unusual memory layout that goes away with the layout is a clean refusal (examine.py).
            refused |= verdict is None
            known |= dict.fromkeys(verdict.known if verdict is not None else ())
        self.count_known(known)
        self.tally.refused += refused
        return refused or bool(known)

    def triage(self, judged: Judged, failing: list[int]) -> None:
        """Hands failing calls to the case mode; what only a batch shows is held against other values of it."""
        accused = self.accused(judged, failing)
        # What a call is asked by itself is compiled anew: once is enough then.
        looks = 1 if self.configurations.hurries else _LOOKED_AGAIN
        if all(self.looked_again[name] >= looks for name in accused):
            self.tally.repeated += 1
            return
        repeated = self.tally.repeated
        if self.handed_over(judged, failing[:_CANDIDATES]):
            if self.tally.repeated > repeated:
                self.looked_again.update(accused)
            return
        batch, worst = judged.batch, judged.worst()
        again = set(self.judged(batch.other(batch.case.seed ^ SECOND_SEED), judged.question).failing())
        both = [index for index in failing if index in again]
        index = (both or failing)[0]
        z, name = worst[index]
        if not both and z <= beyond_doubt(batch.case):
            # One value seed may have bad luck.
            return
        promised = promises(self.backend, str(self.device), "dq")
        if name in BY_BITS and not promised and (not both or self.moves(judged, index)):
            # These bits are not promised, and they come and go.
            return
        seen = "under two value seeds" if both else "once: other values did not show it"
        sequence = CallSequence(batch, index, judged.question, judged.asked)
        if batch.case.level == "layer" and sequence.words(sequence.judged(self.backend, self.device)) is None:
            # Of few samples a budget may be too narrow under two seeds.
            return
        self.note_candidate(judged.call(index))
        small = smallest(sequence, self.backend, self.device, SHRINK_SECONDS)
        words = sequence.words(judged)
        case = small.batch.call(small.index)
        if small != sequence and (alone := self.narrow(case, PROBES)) is not None and alone.first is not None:
            # Once it is small, the call does fail by itself, which is what people would rather read.
            self.hand_over(case, alone)
            if self.tally.repeated > repeated:
                self.looked_again.update(accused)
            return
        if small != sequence and (fewer := small.words(small.judged(self.backend, self.device))) is not None:
            words, sequence = fewer, small
        self.report_as_seen(
            judged.fallen(index) if index in judged.broken else judged.symptom(name),
            "batch",
            f"{words}; seen {seen}, and not where the call runs by itself",
            sequence.batch.call(sequence.index),
            tensor=tensor_of(name),
            sequence=sequence.to_dict(),
        )

    def accused(self, judged: Judged, failing: list[int]) -> set[str]:
        """What failing calls are accused of, each by its worst."""
        worst = judged.worst()
        found = (judged.fallen(i) if i in judged.broken else judged.symptom(worst[i][1]) for i in failing)
        return {symptom.__name__ for symptom in found}

    def moves(self, judged: Judged, index: int) -> bool:
        """Whether a call's results have other bits from one run to the next, which are promised by no statement."""
        moved = moving(judged.batch, self.backend, self.device, judged.question.poison)
        return bool(moved[slice(*judged.batch.spans[index])].any())

    def triage_touched(self, judged: Judged) -> None:
        """Finds out which call wrote to what it was handed."""
        calls = list(range(min(len(judged.batch.ends), _TOUCHED)))
        if not self.handed_over(judged, calls):
            self.note_candidate(judged.batch.case)
            message = f"one of {len(judged.batch.ends)} calls in a row changed an input, or memory between two calls'"
            self.report_as_seen(InputsChanged, "batch", message, judged.batch.case)


def work_on_batches(assignment: Assignment, send: Send) -> None:
    """Does an assignment of batches, sending messages as it goes. What cannot be done is a ``Failed`` message."""
    work(assignment, send, CallsWorker)
