"""A campaign that goes on until it is told to end: rounds of slices, each planned from all that was counted before."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import Random
from typing import Any, Final

from attn_fuzz.campaign.isolated import Isolated, NoDevice, Subject
from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.execution.process import share_of_memory
from attn_fuzz.findings.finding import Finding
from attn_fuzz.nights.aims import aim_at_case, rarest
from attn_fuzz.nights.database import DatabaseError
from attn_fuzz.nights.deaths import Deaths
from attn_fuzz.nights.kept import Kept
from attn_fuzz.nights.leftovers import NotesFolder
from attn_fuzz.nights.pool import OVER_SECONDS, Listener, RoundPool
from attn_fuzz.nights.record import Record, Slice, kind_of
from attn_fuzz.nights.schedule import COMPILED_TIMES, Round, Standing, Target
from attn_fuzz.nights.spaces import space_of
from attn_fuzz.nights.totals import verdicts
from attn_fuzz.nights.view import View
from attn_fuzz.reference.case import Case

SLICE_SECONDS: Final = {"cpu": 8.0, "cuda": 15.0}
"""Of one worker on one target. A process takes a tenth of it to begin on a CPU, and a fifth on a GPU."""

TURNS: Final = 3
"""Of every target, for which there is to be time: after the first it is known what is slow."""

LEAST_SECONDS: Final = 4.0
"""Of a slice, where there is too little time for every target to have its turns."""

SHOW_SECONDS: Final = 0.5
"""Between looks at what workers have told."""

SLICES_A_PLACE: Final = 2
"""In a round: the more, the less time places are idle at its end, and the older what it was planned from."""


_GIVEN_UP: Final = 5
"""Slices in a row that could not run, of every target, after which nothing can be tested here."""


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a campaign is asked for."""

    targets: tuple[Target, ...]
    workers: int
    seed: int
    seconds: float | None
    """None: until it is told to end."""


def planned_anew(
    standings: Mapping[Target, Standing], begun: Iterable[tuple[Target, Slice]], failed: Collection[str], seconds: float
) -> Round:
    """The plan of a round that has begun, from what came of its slices until now: rates are known that were not.

    Args:
        standings: before the round.
        begun: its targets and slices.
        failed: notes of slices that could not run.
        seconds: of a slice.
    """
    foreseen, counted, waiting, left_out = dict(standings), [], [], []
    for target, piece in begun:
        could_not = piece.job.notes in failed and not piece.tally.cases
        if could_not or piece.silence:
            # Another of them would not either, or be silent, too.
            left_out.append(target)
        if could_not:
            continue
        if piece.seconds:
            planned = piece.job.seconds or seconds
            foreseen[target] = foreseen[target].foreseen(piece.tally.cases, piece.seconds, planned)
            counted.append(target)
        else:
            waiting.append(target)
    plan = Round(foreseen, seconds, begun=counted, waiting=waiting)
    for target in left_out:
        plan.leave_out(target)
    return plan


class Supervisor:
    """Runs a campaign.

    Args:
        wishes: what is asked for.
        record: what writes down what comes of it.
        kept: where findings go.
        notes: where workers write what must not be lost.
        deaths: looks into what they die of.
        show: called with the view about once a second, and with a finding when there is a new one.
    """

    def __init__(
        self,
        wishes: Wishes,
        record: Record,
        kept: Kept,
        notes: NotesFolder,
        deaths: Deaths,
        show: Callable[[View, Finding | None], None],
    ) -> None:
        self.wishes, self.record, self.kept, self.notes, self._show = wishes, record, kept, notes, show
        self.deaths = deaths
        compiled = frozenset(target.backend for target in wishes.targets if target.compiled)
        self.view = View(compiled=compiled)
        if wishes.seconds is not None:
            self.view.ends = self.view.begun + wishes.seconds
        self._random = Random(f"{wishes.seed} {record.campaign}")
        self._begun, self._shown = 0, 0.0
        self._near: dict[Target, str] = {}
        self._new: dict[str, int] = {}
        self._failed: set[str] = set()
        self.standings = self._standings()

    def _standings(self) -> dict[Target, Standing]:
        """What each target has had, in this campaign and all before it."""
        found = {target: Standing() for target in self.wishes.targets}
        by_key = {target[:4]: target for target in found}
        for row in verdicts(self.record.database):
            target = by_key.get((row.backend, row.device, row.level, row.mode))
            if target is not None:
                found[target] = Standing(cases=row.cases, seconds=row.seconds, slices=row.slices)
        return found

    def run(self) -> bool:
        """Rounds, until time is up, nothing is left to test, or somebody says so.

        Returns:
            Whether somebody did.
        """
        interrupted = False
        try:
            while not interrupted and self._hopeful() and (not self.view.rounds or self.view.left > LEAST_SECONDS / 2):
                interrupted = self._round()
        except KeyboardInterrupt:
            interrupted = True
        for finding in self.deaths.close(0.0 if interrupted else min(self.view.left, 0.0) + OVER_SECONDS):
            self._found(finding, None)
        self._hear_of_deaths()
        self._write(now=True)
        return interrupted

    def _hear_of_deaths(self) -> None:
        for what in self.deaths.news():
            if isinstance(what, str):
                self.view.remark(what)
            else:
                self._found(what, None)

    def _hopeful(self) -> bool:
        """Whether there is something that has not failed again and again."""
        return any(standing.failures < _GIVEN_UP for standing in self.standings.values())

    # A round.

    def _seconds(self) -> float:
        """Of a slice: shorter where not every target would have its turns."""
        kinds = {target.subject[1] for target in self.standings}
        usual = max(SLICE_SECONDS[kind] for kind in kinds)
        turns = self.view.left * self.wishes.workers / (TURNS * len(self.standings))
        return min(max(LEAST_SECONDS, min(usual, turns)), self.view.left)

    def _round(self) -> bool:
        """One round; whether it was interrupted."""
        seconds = self._seconds()
        in_time = max(1, int(self.view.left / seconds)) if self.view.ends is not None else SLICES_A_PLACE
        count = self.wishes.workers * min(SLICES_A_PLACE, in_time)
        for standing in self.standings.values():
            standing.resting = max(0, standing.resting - 1)
        chosen = Round(self.standings, seconds).slices(count)
        if not chosen:
            # All of them rest; what they failed for may pass.
            self._hear_of_deaths()
            time.sleep(min(1.0, max(self.view.left, 0.0)))
            return False
        slices = [self.record.begin(self._job(target, seconds)) for target in chosen]
        self.view.slices, self._new, self._failed = slices, {}, set()

        def more(left: float) -> Slice:
            plan = planned_anew(self.standings, zip(chosen, slices, strict=True), self._failed, seconds)
            (target,) = plan.slices(1, quick_only=left < COMPILED_TIMES * seconds)
            chosen.append(target)
            slices.append(self.record.begin(self._job(target, seconds)))
            return slices[-1]

        listener = self._listener(more)
        outcome = RoundPool(slices, self.wishes.workers, listener, self.view.left, self.kept.fatal()).run()
        for trouble in outcome.troubles:
            self.view.remark(trouble)
        self._note_standings(chosen, slices)
        self._write(now=True)
        self.record.forget(slices)
        if not self.kept.troubles:
            self.notes.clear()
        self.view.slices, self.view.rounds = (), self.view.rounds + 1
        self.view.alive.clear()
        return outcome.interrupted

    def _job(self, target: Target, seconds: float) -> Assignment:
        """What a worker is told of a slice."""
        self._begun += 1
        turn, standing = self._begun, self.standings[target]
        standing.slices += 1
        times = COMPILED_TIMES if target.compiled else 1.0
        return Assignment(
            backend=target.backend,
            device=target.device,
            # Never the seed of another slice, in this campaign or another.
            seed=self._random.getrandbits(40),
            levels=(target.level,),
            seconds=min(seconds * times, self.view.left),
            mode=target.mode,
            aim=self._aim(target, standing.slices),
            found=self.kept.often(target.backend, target.level, turn),
            counts=True,
            notes=self.notes.beginning(turn),
            memory=share_of_memory(self.wishes.workers) if target.subject[1] == "cpu" else 0,
        )

    def _aim(self, target: Target, number: int) -> Mapping[str, tuple[Any, ...]]:
        """Every other slice draws anything; the others what was too rare, or what was nearly wrong."""
        near = self._near.pop(target, None)
        if near is not None:
            return aim_at_case(Case.from_json(near))
        if number % 2:
            return {}
        reached = self.record.pairs(target.subject)
        return rarest(space_of(*target.subject), reached, target.mode, target.level, self._random)

    # What is told of it.

    def _listener(self, more: Callable[[float], Slice]) -> Listener:
        told = self.record.progress, self.record.reach, self._found, self._note_failure, self._step
        return Listener(*told, more, self.deaths.add)

    def _found(self, finding: Finding, piece: Slice | None) -> None:
        """Stores a finding, of a slice or of what came out about a death."""
        new = self.kept.keep(finding)
        self.record.find(finding, piece)
        if not new:
            return
        subject = (finding.backend, kind_of(finding.device)) if piece is None else piece.subject
        self.view.findings[subject] = self.view.findings.get(subject, 0) + 1
        if piece is not None:
            self._new[piece.job.notes] = self._new.get(piece.job.notes, 0) + 1
        self._show(self.view, finding)

    def _note_failure(self, piece: Slice, reason: str) -> None:
        self._failed.add(piece.job.notes)
        self.view.remark(reason)

    def _step(self, alive: Sequence[Slice]) -> None:
        """Writes and shows what is new, now and then: workers are heard of thousands of times a second."""
        if time.monotonic() - self._shown < SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        self.notes.touch()
        self._hear_of_deaths()
        self.view.alive = Counter(piece.subject for piece in alive)
        self._write()
        self._show(self.view, None)

    def _write(self, *, now: bool = False) -> None:
        """Writes what was counted; where it cannot be, it waits until it can."""
        try:
            self.record.write(now=now)
        except DatabaseError as error:
            self.view.trouble(str(error))

    def _note_standings(self, chosen: Sequence[Target], slices: Sequence[Slice]) -> None:
        """Takes what came of a round into account."""
        silent: dict[str, bool] = {}
        for target, piece in zip(chosen, slices, strict=True):
            standing, tally = self.standings[target], piece.tally
            self.view.done.setdefault(piece.subject, Tally()).add(tally)
            silent[target.device] = silent.get(target.device, True) and not tally.cases
            if piece.job.notes in self._failed and not tally.cases:
                standing.failed()
                continue
            interest = standing.interest
            standing.note(
                tally.cases,
                max(piece.seconds, 1.0),
                findings=self._new.get(piece.job.notes, 0),
                fresh=piece.fresh,
                worst_z=piece.worst_z,
            )
            if standing.interest >= 1.0 and standing.interest > interest and tally.worst_z:
                self._near[target] = tally.worst_case[max(tally.worst_z, key=lambda name: tally.worst_z[name])]
        for device in [device for device, nothing in silent.items() if nothing and self._failed]:
            self._require_device(device)

    def _require_device(self, device: str) -> None:
        """Leaves a device out from now on that no process can use any more."""
        child = Isolated(Subject("loop", device), timeout=60.0)
        try:
            child.symptom(Case(level="kernel", lengths=(2,), head_dim=8))
        except NoDevice:
            self.view.trouble(f"{device} cannot be used any more, so the campaign went on without it")
            self.standings = {target: each for target, each in self.standings.items() if target.device != device}
        finally:
            child.close()
