"""A campaign on several machines: each runs rounds of its own, and hands over what is new; what is lost runs again."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from random import Random
from types import FrameType
from typing import Any, Final

from attn_fuzz import __version__
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.findings.finding import Finding
from attn_fuzz.nights.database import Database, DatabaseError
from attn_fuzz.nights.handed import Handed, noted
from attn_fuzz.nights.kept import Kept
from attn_fuzz.nights.machines import ClusterWishes, Lost, Machines, Place
from attn_fuzz.nights.node import END_SECONDS, Orders
from attn_fuzz.nights.record import Record, Slice, kind_of
from attn_fuzz.nights.view import View

ROUND_SECONDS: Final = 600.0
"""Of one campaign at a place. Then it begins again with what all of them have counted; it takes seconds to begin."""

GRACE: Final = END_SECONDS + 15.0
"""Seconds after its time for which a place is waited for."""

PATIENCE: Final = 12.0
"""Seconds after its time at which a campaign that has not ended is told to: it gives what it is at ten of them."""

LEAST_SECONDS: Final = 1.0
"""Of a round."""

LOOK_SECONDS: Final = 5.0
"""Between looks for machines that have come, or come back."""

_GIVEN_UP: Final = 3
"""Rounds in a row that came to nothing, after which a place has no more of them."""

_MOST_WORKERS: Final = {"cpu": 1_000, "cuda": 16}
"""Of one place (``campaign.plan``: more that share a GPU wait for one another)."""

_BAD: Final = 2
"""Exit status of a campaign that could not do what was asked."""


@dataclasses.dataclass
class _Work:
    """A place at work."""

    place: Place
    node: Any
    answer: Any
    asked: str
    workers: int
    record: Record | None = None
    """Of the round that runs there."""
    cases: int = 0
    """Of that round."""


class Cluster:
    """Runs a campaign on machines.

    Args:
        wishes: what is asked for.
        machines: where.
        database: what is counted goes there.
        kept: findings go there.
        show: called with the view about once a second, and with a finding when there is a new one.
    """

    def __init__(
        self,
        wishes: ClusterWishes,
        machines: Machines,
        database: Database,
        kept: Kept,
        show: Callable[[View, Finding | None], None],
    ) -> None:
        self.wishes, self.machines, self.database, self.kept, self._show = wishes, machines, database, kept, show
        self.view = View()
        if wishes.seconds is not None:
            self.view.ends = self.view.begun + wishes.seconds
        self._random = Random(f"{wishes.seed} {time.time_ns()}")
        self._name = f"attn-fuzz-{self._random.getrandbits(48):012x}"
        self._work: dict[Place, _Work] = {}
        self._failures: Counter[Place] = Counter()
        self._looked = float("-inf")
        self._told_to_end, self._until = False, 0.0
        self._unwritten: list[tuple[Record, list[Slice]]] = []

    def run(self) -> bool:
        """Rounds everywhere, until time is up, no place is left, or somebody says so.

        Returns:
            Whether somebody did.
        """
        with self._signals():
            while self._going_on():
                self._step()
        for work in self._work.values():
            if work.record is not None:
                self.view.remark(f"{work.place} did not answer at the end: what it had not handed over is lost")
        self._write()
        return self._told_to_end

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM are noted, and interrupt nothing: what is handed over is handed over once."""

        def note(number: int, frame: FrameType | None) -> None:
            if not self._told_to_end:
                self._told_to_end, self._until = True, time.monotonic() + GRACE

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def _ending(self) -> bool:
        """Whether nothing begins any more."""
        return self._told_to_end or self.view.left < LEAST_SECONDS

    def _going_on(self) -> bool:
        if self._ending:
            end = self._until if self._told_to_end else (self.view.ends or 0.0) + GRACE
            return bool(self._work) and time.monotonic() < end
        # Machines may come back; those that are there and can do nothing are no hope.
        there = self.machines.places() if not self._work and self._failures else ()
        return not there or any(self._failures[place] < _GIVEN_UP for place in there)

    def _step(self) -> None:
        for work in [*self._work.values()] if self._ending else ():
            if work.record is None and work.asked == "about":
                # It may wait for cores that others have.
                self._drop(work)
        if not self._ending and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            for place in self.machines.places():
                if place not in self._work and self._failures[place] < _GIVEN_UP:
                    self._open(place)
        by_answer = {work.answer: work for work in self._work.values()}
        for answer in self.machines.answered([*by_answer], 0.5) if by_answer else self._rested():
            self._hear(by_answer[answer])
        self._write()
        self.view.alive = Counter({("", place.kind): 0 for place in self._work})
        for work in self._work.values():
            self.view.alive["", work.place.kind] += work.workers if work.record is not None else 0
        self._show(self.view, None)

    def _rested(self) -> tuple[()]:
        time.sleep(0.5)
        return ()

    # One place.

    def _open(self, place: Place) -> None:
        workers = self.wishes.workers or min(max(place.cores, 1), _MOST_WORKERS[place.kind])
        node = self.machines.start(place, f"{self._name}-{place.kind}-{place.number}")
        answer = self.machines.ask(node, "about", place.kind)
        self._work[place] = _Work(place, node, answer, "about", workers)

    def _ask(self, work: _Work, method: str, *arguments: Any) -> None:
        work.asked, work.answer = method, self.machines.ask(work.node, method, *arguments)

    def _hear(self, work: _Work) -> None:
        """Takes an answer, and asks for the next."""
        try:
            value = self.machines.value(work.answer)
        except Lost as lost:
            self._lose(work, f"{work.place} was lost: {lost}; what it was running runs again elsewhere")
            return
        if work.asked == "about":
            if (version := value["attn_fuzz"]) != __version__:
                self._failures[work.place] = _GIVEN_UP
                self._lose(work, f"{work.place} has attn-fuzz {version}, and not {__version__}: it was left out")
                return
            self._begin(work, value)
        elif work.asked == "begin":
            self._ask(work, "take")
        elif work.asked == "close":
            self._drop(work)
        else:
            self._take(work, value)

    def _lose(self, work: _Work, sentence: str) -> None:
        self.view.remark(sentence)
        self._failures[work.place] += 1
        self._drop(work)

    def _drop(self, work: _Work) -> None:
        self.machines.stop(work.node)
        del self._work[work.place]

    def _close(self, work: _Work) -> None:
        if self.kept.troubles:
            self.view.remark(f"{work.place} keeps what it found in its folder for temporary files, {self._name}-*")
            self._drop(work)
        else:
            self._ask(work, "close")

    def _begin(self, work: _Work, about: Mapping[str, str]) -> None:
        """A round, unless it is the end."""
        if self._ending:
            self._close(work)
            return
        seed, seconds = self._random.getrandbits(40), min(ROUND_SECONDS, self.view.left)
        environment = {**about, "machine": work.place.host, "node": work.place.machine}
        work.record, work.cases = Record(self.database, seed, seconds, environment), 0
        wishes = self.wishes
        orders = Orders(
            device=work.place.kind,
            workers=work.workers,
            seed=seed,
            seconds=seconds,
            backends=wishes.backends,
            levels=wishes.levels,
            mode=wishes.mode,
        )
        self._ask(work, "begin", orders, self.database.copied())

    def _take(self, work: _Work, handed: Handed) -> None:
        """What a place has handed over."""
        assert work.record is not None
        for data in handed.findings:
            self._keep(Finding.from_dict(data), work.record)
        self._unwritten.append((work.record, [noted(work.record, piece) for piece in handed.pieces]))
        for piece in handed.pieces:
            work.cases += piece.tally.cases
            self.view.done.setdefault((piece.backend, kind_of(piece.device)), Tally()).add(piece.tally)
        self._write()
        if handed.running:
            hurry = self._told_to_end or self.view.left < -PATIENCE
            self._ask(work, "end" if hurry else "take")
            return
        if handed.status == _BAD or not work.cases:
            self._failures[work.place] += 1
            self.view.remark(f"{work.place}: {handed.said.removeprefix('attn-fuzz: ') or 'nothing was tested'}")
        else:
            self._failures[work.place] = 0
        self._end(work.record)
        work.record = None
        if self._failures[work.place] >= _GIVEN_UP or self._ending:
            self._close(work)
        else:
            self._ask(work, "about", work.place.kind)

    def _end(self, record: Record) -> None:
        self.view.rounds += 1
        try:
            record.end()
        except DatabaseError as error:
            self.view.trouble(str(error))

    def _keep(self, finding: Finding, record: Record) -> None:
        # Its folder, and what it was taken for there, say nothing here.
        finding = dataclasses.replace(finding, root="", same_as="")
        subject = finding.backend, kind_of(finding.device)
        record.find(finding, None)
        if self.kept.keep(finding):
            self.view.findings[subject] = self.view.findings.get(subject, 0) + 1
            self._show(self.view, finding)

    def _write(self) -> None:
        """Writes what was counted; where it cannot be, it waits until it can."""
        try:
            while self._unwritten:
                record, slices = self._unwritten[0]
                record.write(now=True)
                record.forget(slices)
                del self._unwritten[0]
        except DatabaseError as error:
            self.view.trouble(str(error))
