"""One worker of the batch mode: batches until time or number is used up; a call that fails goes to the case mode."""

from __future__ import annotations

import copy
import os
import time
from random import Random
from typing import Final

import torch

from attn_fuzz.batch.calls_batch import BY_BITS, SCHEDULE, Judged, Question, judge, moving
from attn_fuzz.campaign.messages import Assignment, Died, Finished, Progress, Trying
from attn_fuzz.campaign.triage import Triage
from attn_fuzz.campaign.worker import Send, hunt
from attn_fuzz.execution.inferred import promises
from attn_fuzz.execution.process import DEAD_CONTEXT, context_alive, leave_memory
from attn_fuzz.execution.timing import now
from attn_fuzz.generation.calls import LONGEST, CallBatch, compiles_for_calls, draw_batch
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.generation.strategies import Domain
from attn_fuzz.oracle.deviations import beyond_doubt
from attn_fuzz.oracle.symptoms import Crashed, InputsChanged
from attn_fuzz.oracle.trial import SECOND_SEED
from attn_fuzz.reduction.call_sequence import CallSequence, smallest

FIRST_CALLS: Final = 4
MOST_CALLS: Final = {"cuda": 256, "cpu": 32}
"""More calls make each cheaper, but have their configuration in common: many batches see more of those."""

BATCH_SECONDS: Final = 2.0
"""Batches grow until one takes so long."""

BEAT_SECONDS: Final = 5.0
"""Silence after which a call says that there are more to come."""

REFUSED_BATCHES: Final = 60
"""A backend that has refused so many and taken none would refuse for ever."""

_CANDIDATES: Final = 3
"""Calls of a failing batch that are looked at on their own: its victims are much alike."""

SHRINK_SECONDS: Final = 20.0
"""How long calls are left out of a batch that fails after other calls only."""

_TOUCHED: Final = 64
"""Calls that are looked at on their own where something was written that may not be."""


class BatchWorker(Triage):
    """The state of one assignment of batches."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        super().__init__(assignment, send)
        kind = self.device.type
        self.domain = Domain.of(self.backend.kernel.capabilities_on(kind), kind, assignment.dtypes)
        self.random = Random(assignment.seed)
        self.sweeps = [Sweep(longest, self.random.randrange(1 << 16)) for longest in LONGEST[kind]]
        self.calls = [FIRST_CALLS] * len(self.sweeps)
        self.turn = 0

    def draw(self, size: int) -> CallBatch | None:
        """The next batch of a size; no more calls than are still asked for.

        None where nothing that was drawn is taken, as by backends that compile for every layout or option.
        """
        if compiles_for_calls(self.domain.capabilities):
            return None
        wanted = self.calls[size]
        if self.assignment.cases is not None:
            wanted = min(wanted, self.assignment.cases - self.tally.cases)
        batch = draw_batch(self.random, self.sweeps[size], self.backend, self.domain, wanted)
        return batch.first(wanted) if batch is not None else None

    def judge(self, batch: CallBatch, turn: Question) -> Judged:
        """A batch's verdict, with the batch announced first."""
        self.send(Trying(batch.case.to_json(), batch.ends))
        judged = judge(batch, self.backend, self.device, turn, self.beat)
        if judged.broken and not context_alive(self.device):
            self.send(Died(next(iter(judged.broken.values()))))
            os._exit(DEAD_CONTEXT)
        return judged

    def beat(self) -> None:
        """Says now and then that calls go on: a batch of a slow kernel takes as long as many cases."""
        if time.monotonic() - self.last_sent > BEAT_SECONDS:
            self.last_sent = time.monotonic()
            self.send(Progress(copy.deepcopy(self.tally)))

    def batch(self, size: int) -> None:
        """One batch, judged, and pursued where a call fails."""
        batch = self.draw(size)
        if batch is None:
            self.tally.refused += 1
            self.refusals["no call that was drawn is one that it declares to take"] += 1
            return
        started = now(self.device)
        try:
            judged = self.judge(batch, SCHEDULE[self.turn % len(SCHEDULE)])
            leave_memory(self.device)
            taken = now(self.device) - started
            if taken < BATCH_SECONDS / 2:
                # A call takes its share at most: what is quick may grow at once.
                growth = 4 if taken < BATCH_SECONDS / 4 else 2
                self.calls[size] = min(growth * self.calls[size], MOST_CALLS[self.device.type])
            self.take(judged)
        except (torch.OutOfMemoryError, MemoryError) as error:
            # This machine's limit, and nobody's fault.
            self.calls[size] = max(self.calls[size] // 2, 1)
            self.tally.refused += 1
            self.refusals[f"memory ran out: {error}"] += 1

    def take(self, judged: Judged) -> None:
        """Adds a batch to the tally, and pursues what failed of it."""
        failing = judged.failing()
        self.tally_batch(judged, failing)
        if judged.touched:
            self.triage_touched(judged)
        elif failing:
            self.triage(judged, failing)

    def tally_batch(self, judged: Judged, failing: list[int]) -> None:
        """Adds the calls to the tally, each as one case."""
        tally, case = self.tally, judged.batch.case
        taken = len(judged.batch.ends) - len(judged.refused)
        tally.cases += taken
        tally.refused += len(judged.refused)
        self.refusals.update(judged.refused.values())
        tally.documents += len(case.packed_lengths)
        tally.seconds = time.monotonic() - self.started
        kind = f"batch {case.dtype}"
        tally.by_kind[kind] = tally.by_kind.get(kind, 0) + taken
        for path in judged.paths:
            tally.paths[path] = tally.paths.get(path, 0) + taken
        if not failing and not judged.touched:
            for key, (z, index) in judged.largest().items():
                if z > tally.worst_z.get(f"{kind} {key}", -1.0):
                    tally.worst_z[f"{kind} {key}"] = z
                    tally.worst_case[f"{kind} {key}"] = judged.call(index).to_json()
        self.last_sent = time.monotonic()
        self.send(Progress(copy.deepcopy(tally)))

    def handed_over(self, judged: Judged, calls: list[int]) -> bool:
        """Whether the case mode fails one of these calls, or explains it: a known issue, or a refused layout."""
        known: dict[str, None] = {}
        refused = False
        for index in calls:
            small = judged.call(index)
            verdict = self.narrow(small)
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
        if self.handed_over(judged, failing[:_CANDIDATES]):
            return
        batch, worst = judged.batch, judged.worst()
        again = set(self.judge(batch.other(batch.case.seed ^ SECOND_SEED), judged.turn).failing())
        both = [index for index in failing if index in again]
        index = (both or failing)[0]
        z, name = worst[index]
        if not both and z <= beyond_doubt(batch.case):
            # One value seed may have bad luck.
            return
        promised = promises(self.backend, str(self.device), "dq")
        if (
            name in BY_BITS
            and not promised
            and (not both or index in moving(batch, self.backend, self.device, judged.turn.poison))
        ):
            # Nobody has promised these bits, and they come and go.
            return
        seen = "under two value seeds" if both else "once: other values did not show it"
        sequence = CallSequence(batch, index, judged.turn, judged.asked)
        self.note_candidate(judged.call(index))
        small = smallest(sequence, self.backend, self.device, SHRINK_SECONDS)
        words = sequence.words(judged)
        if small != sequence and (fewer := small.words(small.judged(self.backend, self.device))) is not None:
            words, sequence = fewer, small
        self.report_as_seen(
            Crashed if index in judged.broken else judged.symptom(name),
            "batch",
            f"{words}; seen {seen}, and not where the call runs by itself",
            sequence.batch.call(sequence.index),
            sequence.to_dict(),
        )

    def triage_touched(self, judged: Judged) -> None:
        """Finds out which call wrote to what it was handed."""
        calls = list(range(min(len(judged.batch.ends), _TOUCHED)))
        if not self.handed_over(judged, calls):
            self.note_candidate(judged.batch.case)
            message = f"one of {len(judged.batch.ends)} calls in a row changed an input, or memory between two calls'"
            self.report_as_seen(InputsChanged, "batch", message, judged.batch.case)

    def run(self) -> None:
        """Sizes in turn."""
        if "kernel" not in self.assignment.levels or "kernel" not in self.backend.levels:
            raise ValueError(f"{self.backend.name} has no kernel level here, and batches are of kernel calls")
        while not self.turn or not self.over():
            self.batch(self.turn % len(self.sweeps))
            self.turn += 1
            if not self.tally.cases and self.tally.refused > REFUSED_BATCHES:
                # The other modes have more to offer it: its tally says that nothing was tested here.
                break
            if self.found and self.assignment.stop_at_first:
                break
        self.tally.seconds = time.monotonic() - self.started
        self.send(Finished(self.tally))


def work_on_batches(assignment: Assignment, send: Send) -> None:
    """Does an assignment of batches, sending messages as it goes. What cannot be done is a ``Failed`` message."""
    hunt(assignment, send, BatchWorker)
