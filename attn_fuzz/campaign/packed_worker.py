"""One worker of the packed mode: packed calls until time or number is used up; what fails is cut out and shrunk."""

from __future__ import annotations

import copy
import os
import time
from random import Random
from typing import Final

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.batch.batch_size import affordable, bearable, masks_whole_pack
from attn_fuzz.batch.layer import draw_layer_case, layer_verdict
from attn_fuzz.batch.packed import Outcome, PackedFailure, confirmed, probe_verdict, verdicts
from attn_fuzz.batch.packed_call import Call
from attn_fuzz.batch.probes import PROBES
from attn_fuzz.campaign.messages import Assignment, Died, Finished, Progress, Trying
from attn_fuzz.campaign.triage import Triage
from attn_fuzz.campaign.worker import Send, hunt
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.process import DEAD_CONTEXT, context_alive
from attn_fuzz.execution.timing import now
from attn_fuzz.generation.length_sweeps import LONGEST, Sweep, draw_case
from attn_fuzz.generation.strategies import Domain
from attn_fuzz.oracle.deviations import LIMIT, limit
from attn_fuzz.oracle.examine import USUAL_MEMORIES
from attn_fuzz.reduction.packed import bisected, candidates, plainer
from attn_fuzz.reference.case import LEVELS, Case

FIRST_DOCUMENTS: Final = 64
MOST_DOCUMENTS: Final = 16384

CALL_SECONDS: Final = 0.5
"""Calls grow until one takes so long, of processor time on a CPU, so that a busy machine's are as large as an idle
one's: a slow kernel is asked for fewer documents than a fast one, without anybody saying which it is."""

REFUSED_CALLS: Final = 60
"""A backend that has refused so many and taken none would refuse for ever."""

BISECT_SECONDS: Final = 30.0

WAYS: Final = ("budget", "keys", "twice", "needle", "budget", "every row", "twice", "swamping")
"""How kernel calls are judged, in turn: by the budget; by the budget and the bits of a second run; by a probe."""

_GROWN: Final = 7
"""Where kernels form masks over the whole pack, one call in so many has as many documents as there is memory for; with
levels, sizes and ways in turn, it comes to all of them."""

CROWD: Final = 1100
"""Documents of a call now and then, whatever it takes: more than 2^10, with 2^13 to 2^15 queries in them."""

# With sizes and ways in turn, crowds of all sizes come to be judged in all ways.
_CROWDED, _FIRST_CROWDED = 7, 3

_BISECTIONS: Final = 3
"""A fault that no cut-out shows is bisected so often, not in every call that it spoils."""


class PackedWorker(Triage):
    """The state of one wide assignment."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        super().__init__(assignment, send)
        self.domain = Domain.of(
            self.backend.kernel.capabilities_on(self.device.type), self.device.type, assignment.dtypes
        )
        self.random = Random(assignment.seed)
        sizes = LONGEST[self.device.type]
        self.sweeps = [Sweep(longest, self.random.randrange(1 << 16)) for longest in sizes]
        self.documents = {(level, size): FIRST_DOCUMENTS for level in LEVELS for size in range(len(sizes))}
        self.bisections = 0
        self.way, self.turn, self.kernel_calls, self.masked = WAYS[0], 0, 0, 0
        self.masks_all = self.device.type == "cpu" and masks_whole_pack(
            self.backend, self.domain, lambda case: self.send(Trying(case.to_json()))
        )

    def wide_fails(self, case: Case) -> bool:
        """Whether a packed call fails, announced first."""
        self.send(Trying(case.to_json()))
        try:
            return confirmed(case, self.judge(case), self.judge) is not None
        except UnsupportedCase:
            return False

    def draw(self, level: str, size: int) -> Case | None:
        """The next case of a level and size."""
        documents = self.documents[level, size]
        if self.masks_all:
            most = bearable if self.masked % _GROWN == _GROWN - 1 else affordable
            documents = min(documents, most(self.sweeps[size].longest))
            self.masked += 1
        elif self.crowded(level):
            documents = max(documents, CROWD)
        if level == "layer":
            longest = self.sweeps[size].longest[0]
            return draw_layer_case(self.random, self.backend, self.domain, documents, longest)
        # Over the whole pack a mask with thousands of rows would take minutes.
        long = not self.masks_all
        return draw_case(self.random, self.sweeps[size], self.backend, self.domain, documents, long=long)

    def crowded(self, level: str) -> bool:
        """Whether it is the turn of a call of more documents than CALL_SECONDS allow, and there is time for it."""
        if level != "kernel" or self.masks_all or self.device.type != "cpu":
            return False
        self.kernel_calls += 1
        left = self.assignment.seconds is None or time.monotonic() - self.started < 0.7 * self.assignment.seconds
        return left and self.kernel_calls % _CROWDED == _FIRST_CROWDED

    def judge(self, case: Case) -> Outcome:
        """Runs a case and judges its documents in the way whose turn it is."""
        if case.level == "layer":
            return layer_verdict(case, self.backend, self.device)
        if self.way in PROBES:
            return probe_verdict(case, self.backend, self.device, self.way)
        (outcome,) = verdicts(Call.of(case, self.device), [self.backend], twice=self.way == "twice")
        return outcome

    def call(self, level: str, size: int) -> None:
        """One case of many documents, judged, and pursued where it fails."""
        case = self.draw(level, size)
        if case is None:
            self.tally.refused += 1
            self.refusals["no call that was drawn is one that it declares to take"] += 1
            return
        self.send(Trying(case.to_json()))
        started = now(self.device)
        size_of = (level, size)
        try:
            outcome = self.judge(case)
            if outcome.broken is not None and not context_alive(self.device):
                self.send(Died(outcome.broken))
                os._exit(DEAD_CONTEXT)
            if self.refuses_layout(case, outcome):
                self.tally.refused += 1
                return
            if now(self.device) - started < CALL_SECONDS / 2:
                self.documents[size_of] = min(2 * self.documents[size_of], MOST_DOCUMENTS)
            found = confirmed(case, outcome, self.judge)
        except UnsupportedCase as refusal:
            self.tally.refused += 1
            self.refusals[str(refusal)] += 1
            return
        except (torch.OutOfMemoryError, MemoryError):
            if self.documents[size_of] <= 1:
                raise
            self.documents[size_of] //= 2
            return
        self.tally_call(case, outcome, clean=found is None)
        if found is not None:
            self.triage(found)

    def refuses_layout(self, case: Case, outcome: Outcome) -> bool:
        """Whether a call fell over an unusual memory layout and does not without: a clean refusal, as elsewhere."""
        if outcome.broken is None or case.level != "kernel" or case.memory in USUAL_MEMORIES:
            return False
        if self.judge(case.replace(memory="contiguous")).broken is not None:
            return False
        self.refusals[str(outcome.broken)] += 1
        return True

    def tally_call(self, case: Case, outcome: Outcome, *, clean: bool) -> None:
        """Adds a call to the tally, as one case of many documents."""
        tally = self.tally
        tally.cases += 1
        tally.documents += len(case.packed_lengths)
        tally.seconds = time.monotonic() - self.started
        kind = f"wide-{'probe' if outcome.probe else case.level} {case.dtype}"
        tally.by_kind[kind] = tally.by_kind.get(kind, 0) + 1
        if clean and not outcome.probe:
            worst, places = (outcome.z * LIMIT / limit(case)).max(0)
            for name, z, place in zip(outcome.names, worst.tolist(), places.tolist(), strict=True):
                if name == "bits":
                    continue
                key = f"{kind} {name}"
                alone = subset(case, [place])
                if z > tally.worst_z.get(key, -1.0) and alone is not None:
                    tally.worst_z[key], tally.worst_case[key] = z, alone.to_json()
        self.send(Progress(copy.deepcopy(tally)))

    def triage(self, found: PackedFailure) -> None:
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
        small = bisected(found.case, self.wide_fails, BISECT_SECONDS)
        # What needs many documents needs little of each, and the case mode looks at all of them every time.
        small = plainer(small, self.wide_fails, BISECT_SECONDS)
        verdict = self.narrow(small)
        if verdict is not None and verdict.first is not None:
            self.hand_over(small, verdict)
        else:
            # The smallest packed call that fails, which no small case shows.
            self.report_as_seen(found.symptom, "packed", found.message, small)

    def run(self) -> None:
        """Levels and sizes in turn."""
        levels = [level for level in self.assignment.levels if level in self.backend.levels]
        if not levels:
            raise ValueError(f"{self.backend.name} has no {' or '.join(self.assignment.levels)} level")
        while not self.turn or not self.over():
            level, round_ = levels[self.turn % len(levels)], self.turn // len(levels)
            size = round_ % len(self.sweeps)
            self.way = WAYS[(round_ // len(self.sweeps)) % len(WAYS)]
            self.call(level, size)
            self.turn += 1
            if not self.tally.cases and self.tally.refused > REFUSED_CALLS:
                raise ValueError(
                    f"{self.backend.name} refused all {self.tally.refused} calls, most with: {self.most_refused()}"
                )
            if self.found and self.assignment.stop_at_first:
                break
        self.tally.seconds = time.monotonic() - self.started
        self.send(Finished(self.tally))


def work_on_packed(assignment: Assignment, send: Send) -> None:
    """Does a wide assignment, sending messages as it goes. What cannot be done is a ``Failed`` message."""
    hunt(assignment, send, PackedWorker)
