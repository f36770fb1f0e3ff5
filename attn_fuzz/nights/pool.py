"""The pool of one round: what one backend cannot do ends its own slice, and no night."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from attn_fuzz.campaign.endings import excuse
from attn_fuzz.campaign.inquest import Suspect, suspect_of
from attn_fuzz.campaign.messages import Assignment, Covered, Failed, Finished, Message, Progress, Tally, Trying
from attn_fuzz.campaign.pool import RESTARTS, Pool
from attn_fuzz.coverage.counts import Reached
from attn_fuzz.findings.finding import Finding
from attn_fuzz.nights.record import Slice

_LATE: Final = 20.0
"""Seconds after its time at which a slice is one that others do not wait for: it hangs, or shrinks what it found."""

_WORTH: Final = 6.0
"""Seconds that a slice has left, for which a place that is idle is given another slice: those of backends that compile
are three times as long as others."""

_REFILLS: Final = 8
"""Slices of a round and place beyond those that were planned, after which it ends as soon as it can."""

_LEAST: Final = 1.0
"""Seconds of a slice that begins when time is over."""

_SUSPICIOUS: Final = 20.0
"""Seconds of silence after which what a worker is at is asked in another process, while it goes on."""

_SILENT: Final = 4.0
"""Seconds after which a worker says more than that it has begun, or runs a batch."""

OVER_SECONDS: Final = 10.0
"""Seconds after the end of its time that a round waits for what is begun: batches in the middle, and shrinking."""


class Listener(NamedTuple):
    """What is told of slices as they go on."""

    progress: Callable[[Slice, Tally], None]
    reached: Callable[[Slice, Reached], None]
    found: Callable[[Finding, Slice], None]
    failed: Callable[[Slice, str], None]
    """Something that was to run could not; a sentence."""
    step: Callable[[Sequence[Slice]], None]
    """Called about once a second, and more often where there is news, with the slices that have a worker."""
    more: Callable[[float], Slice]
    """Begins another slice, of so many seconds at most, while one that takes longer keeps the round from its end."""
    suspect: Callable[[Suspect], None]
    """Has what a worker died of, or fell silent for, looked into."""


class RoundPool(Pool):
    """Runs slices.

    Args:
        slices: each with an assignment whose ``notes`` are its own.
        workers: processes at a time.
        listener: what is told.
        seconds: those after which no slice goes on.
        fatal: what is known to end a backend's process or to make it hang, which is not looked into again.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        workers: int,
        listener: Listener,
        seconds: float,
        fatal: Sequence[Finding] = (),
    ) -> None:
        super().__init__([each.job for each in slices], workers, lambda tallies: None, self._tell_found, seconds)
        self._listener = listener
        self._slices = {each.job.notes: each for each in slices}
        self._tallies_of: dict[str, dict[int, Tally]] = {}
        self._heard_of, self._refills = slices[0], 0
        self._lost: dict[str, float] = {}
        """Seconds of silence of workers that are no more, by slice."""
        self._suspected: list[Trying] = []
        self._findings.update({(finding.backend, finding.symptom): finding for finding in fatal})

    def _slice(self, assignment: Assignment) -> Slice:
        # One that was started again after a death has another assignment, with the same notes.
        return self._slices[assignment.notes]

    def _in_time(self, assignment: Assignment) -> Assignment:
        """A slice as long as it was planned, or as there is time."""
        assert self._seconds is not None
        assert assignment.seconds is not None
        left = self._started + self._seconds - time.monotonic()
        return dataclasses.replace(assignment, seconds=max(min(assignment.seconds, left), _LEAST))

    def _tell_found(self, finding: Finding) -> None:
        # What was being shrunk at the end is kept without a message.
        of_backend = (each for each in self._slices.values() if each.job.backend == finding.backend)
        heard_of = self._heard_of
        self._listener.found(finding, heard_of if heard_of.job.backend == finding.backend else next(of_backend))

    def _tallies(self) -> dict[str, Tally]:
        """Nothing: slices have tallies of their own."""
        return {}

    def _take(self, worker: Any, message: Message) -> None:
        piece = self._heard_of = self._slice(worker.assignment)
        match message:
            case Failed(reason):
                worker.finished = True
                self._listener.failed(piece, reason)
                return
            case Covered(reached):
                self._listener.reached(piece, reached)
        super()._take(worker, message)
        if isinstance(message, (Progress, Finished)):
            self._tell_progress(piece, worker)

    def _tell_progress(self, piece: Slice, worker: Any) -> None:
        """What all workers that a slice has had have done."""
        mine = self._tallies_of.setdefault(piece.job.notes, {})
        mine[id(worker)] = worker.tally
        total = worker.tally
        if len(mine) > 1:
            total = Tally()
            for tally in mine.values():
                total.add(tally)
        self._listener.progress(piece, total)

    def _bury(self, worker: Any, symptom: str, how: str) -> None:
        piece = self._heard_of = self._slice(worker.assignment)
        self._lost[piece.job.notes] = self._lost.get(piece.job.notes, 0.0) + _silence(worker)
        if worker.trying is not None:
            super()._bury(worker, symptom, how)
            return
        worker.process.kill()
        worker.process.join()
        self._running.remove(worker)
        self._done.append(worker)
        if symptom == "Crashed" and excuse(worker.process.exitcode) and worker.restarts < RESTARTS:
            # Nobody's fault.
            self._waiting.append((worker.assignment, worker.restarts + 1))
            return
        self._listener.failed(piece, f"a worker for {worker.assignment.backend} {how} before its first case")

    def _look_into(self, worker: Any, finding: Finding, how: str, excused: str) -> None:
        """Has others do it, beside the round; what is known well enough counts once more."""
        if not excused and (finding.backend, finding.symptom) in self._findings:
            self._keep(finding)
            return
        said = f"the worker for {finding.backend} {excused}: no finding" if excused else ""
        self._listener.suspect(Suspect(finding, worker.trying, sure=not excused, silence=_silence(worker), how=said))

    def _note_silence(self) -> None:
        """What silence takes of a slice's time counts, too: nothing else tells of those that hang."""
        for worker in self._running:
            piece = self._slice(worker.assignment)
            silence = self._lost.get(piece.job.notes, 0.0) + _silence(worker)
            piece.dirty |= silence != piece.silence
            piece.silence = silence
            if silence > _SUSPICIOUS and worker.trying not in self._suspected and worker.trying is not None:
                # It may come back: in another process it is known sooner.
                self._suspected.append(worker.trying)
                self._listener.suspect(suspect_of(piece.job.backend, piece.job.device, worker.trying, silence))

    def _is_late(self, worker: Any) -> bool:
        return time.monotonic() - worker.started > (worker.assignment.seconds or 0.0) + _LATE

    def _left(self, worker: Any) -> float:
        """Seconds that a slice has left."""
        return (worker.assignment.seconds or 0.0) - (time.monotonic() - worker.started)

    def _refill(self) -> None:
        """Gives a place that is idle another slice, where it would have to wait for a late one, or for a long one."""
        assert self._seconds is not None
        idle = not self._waiting and len(self._running) < self._limit
        in_time = time.monotonic() - self._started < self._seconds - _LATE
        if not idle or not in_time or self._refills >= _REFILLS * self._limit:
            return
        late, left = any(map(self._is_late, self._running)), max(map(self._left, self._running), default=0.0)
        if not late and left < _WORTH:
            return
        self._refills += 1
        piece = self._listener.more(math.inf if late else left)
        if not late:
            # What it is begun for ends then, and so does the round.
            piece.job = dataclasses.replace(piece.job, seconds=min(piece.job.seconds or left, left))
        self._slices[piece.job.notes] = piece
        self._waiting.append((piece.job, 0))

    def _stop_late_ones(self) -> None:
        """Ends what goes on after all time is over; counts stay, and what was being shrunk is kept as it is."""
        assert self._seconds is not None
        if time.monotonic() - self._started < self._seconds + OVER_SECONDS:
            return
        self._waiting.clear()
        for worker in list(self._running):
            worker.process.kill()
            worker.process.join()
            self._drain(worker)
            self._running.remove(worker)
            self._done.append(worker)
            self._keep_candidate(worker)

    def _step(self) -> None:
        self._refill()
        self._stop_late_ones()
        if not self._running and not self._waiting:
            return
        super()._step()
        self._note_silence()
        self._listener.step([self._slice(worker.assignment) for worker in self._running])


def _silence(worker: Any) -> float:
    """Seconds since a worker was heard of, if they are many."""
    silence = time.monotonic() - worker.heard
    return silence if silence > _SILENT else 0.0
