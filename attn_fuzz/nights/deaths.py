"""Deaths and silences of workers, looked into beside the campaign, and none forgotten when it is killed.

A round does not wait for it. What is known of a suspect is a file in the campaign's folder of notes, written anew
whenever an inquest has come a step further: a campaign that is killed loses one step, and the next one goes on there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from attn_fuzz.campaign import notes
from attn_fuzz.campaign.inquest import Inquest, Suspect, look_into
from attn_fuzz.campaign.isolated import FATAL
from attn_fuzz.campaign.pool import HANG_SECONDS
from attn_fuzz.execution.process import in_words
from attn_fuzz.findings.finding import Finding

SUSPECT: Final = "suspect-"
"""What the names of these files begin with."""

PATIENCE: Final = 30.0
"""Seconds after which a case counts as hanging, on a CPU and of what does not compile: its process has loaded
everything before."""

_KNOWN_PATIENCE: Final = 5.0
"""The same where it is known that the backend hangs, and nothing would come of it but that."""

AT_ONCE: Final = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Suspects that are looked into at a time, each of another backend: most of it is waiting for what says nothing. On a
machine of few processors it would slow down what others are timed by."""


class Deaths:
    """Looks into suspects.

    Args:
        folder: of the campaign's notes.
        compiled: backends that may compile for minutes.
        known: (backend, symptom) of what needs no other finding.
        at_once: how many suspects are looked into at a time.
    """

    def __init__(
        self,
        folder: Path,
        compiled: Collection[str] = (),
        known: Collection[tuple[str, str]] = (),
        at_once: int = AT_ONCE,
    ) -> None:
        self._folder, self._compiled, self._known = folder, frozenset(compiled), set(known)
        self._pending: dict[Path, Suspect] = {}
        self._news: list[tuple[Finding | str, Path]] = []
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._at_once = at_once
        self._threads: list[threading.Thread] = []
        self._at: set[str] = set()
        """Backends of which a suspect is being looked into."""
        self._ended = False

    def add(self, suspect: Suspect) -> None:
        """Has a suspect looked into, once it is noted; one like it that waits already is enough."""
        with self._lock:
            if any(_alike(suspect, other) for other in self._pending.values()):
                return
            path = self._folder / f"{SUSPECT}{next(self._numbers)}"
            _write(path, suspect.to_dict())
            self._pending[path] = suspect
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if len(self._at) < self._at_once and (found := self._next()) is not None:
                self._threads.append(threading.Thread(target=self._work, args=found, daemon=True, name="deaths"))
                self._threads[-1].start()

    @property
    def pending(self) -> int:
        """Suspects that have not been looked into to the end."""
        return len(self._pending)

    def news(self) -> Iterator[Finding | str]:
        """What has come out since the last time: findings, and sentences about what was none.

        The note of a finding is taken away when the next one is asked for: it has to be stored by then.
        """
        while self._news:
            what, path = self._news.pop(0)
            yield what
            path.unlink(missing_ok=True)

    def close(self, seconds: float = 0.0) -> list[Finding]:
        """Ends it; what is not sure stays noted.

        Args:
            seconds: how long it may go on.

        Returns:
            What is sure of what was not looked into to the end.
        """
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        with self._lock:
            self._ended = True
            sure = {path: suspect for path, suspect in self._pending.items() if suspect.sure}
            for path in sure:
                del self._pending[path]
        return [suspect.finding for suspect in sure.values()]

    # In threads of their own.

    def _next(self) -> tuple[Path, Suspect] | None:
        """What most is known against, of a backend that nobody else is at; None where there is nothing. The lock is
        held."""
        waiting = {path: each for path, each in self._pending.items() if each.finding.backend not in self._at}
        if self._ended or not waiting:
            return None
        path = max(waiting, key=lambda each: self._weight(waiting[each]))
        self._at.add(waiting[path].finding.backend)
        return path, waiting[path]

    def _weight(self, suspect: Suspect) -> tuple[Any, ...]:
        """The larger, the sooner it is looked into.

        A backend that is silent again and again hangs more likely than one that was so once, for longer; and of one
        that is known to crash or to hang there is less to find out.
        """
        name = suspect.finding.backend
        silence = sum(each.silence for each in self._pending.values() if each.finding.backend == name)
        unknown = not any((name, symptom) in self._known for symptom in FATAL)
        return suspect.confirmed, suspect.sure, unknown, silence, suspect.silence

    def _work(self, path: Path, suspect: Suspect) -> None:
        """Looks into a suspect, and into what is next after it."""
        found: tuple[Path, Suspect] | None = (path, suspect)
        while found is not None:
            path, suspect = found
            try:
                self._tell(path, self._looked_into(path, suspect))
            finally:
                with self._lock:
                    self._at.discard(suspect.finding.backend)
            with self._lock:
                found = self._next()

    def _looked_into(self, path: Path, suspect: Suspect) -> Finding | str:
        backend, device = suspect.finding.backend, suspect.finding.device
        known = {symptom for name, symptom in self._known if name == backend}
        patience = HANG_SECONDS if device != "cpu" or backend in self._compiled else PATIENCE
        if "Hung" in known and not suspect.sure:
            patience = _KNOWN_PATIENCE
        inquest = Inquest(suspect, patience, lambda more: self._learn(path, more), known)
        try:
            return look_into(inquest)
        except Exception as error:
            # A mistake of the harness, or a machine without processes: nothing that is sure is lost by it.
            said = f"what a worker for {backend} ended or was silent over could not be looked into: {in_words(error)}"
            return inquest.suspect.finding if inquest.suspect.sure else said

    def _learn(self, path: Path, suspect: Suspect) -> None:
        """Notes what is known of a suspect now."""
        with self._lock:
            if not self._ended:
                self._pending[path] = suspect
                _write(path, suspect.to_dict())

    def _tell(self, path: Path, what: Finding | str) -> None:
        with self._lock:
            if self._ended:
                return
            del self._pending[path]
            # It is in no store before somebody asks for the news.
            found = path.with_name(f"{path.name}{notes.FOUND}0")
            if isinstance(what, Finding):
                self._known.add((what.backend, what.symptom))
                _write(found, what.to_dict())
            path.unlink(missing_ok=True)
            if what:
                self._news.append((what, found))


def _alike(one: Suspect, other: Suspect) -> bool:
    """Whether one of two would tell what the other does."""
    if one.finding.backend != other.finding.backend:
        return False
    return one.trying == other.trying or (one.sure and other.sure and one.finding.symptom == other.finding.symptom)


def _write(path: Path, data: dict[str, Any]) -> None:
    # On a full disk it is looked into all the same.
    with contextlib.suppress(OSError):
        notes.write(str(path), data)


def left_behind(folder: Path) -> Iterator[Suspect]:
    """The suspects that a campaign which is no more had not looked into to the end."""
    for data in notes.readable(folder, f"{SUSPECT}*[0-9]"):
        with contextlib.suppress(LookupError, TypeError, ValueError):
            yield Suspect.from_dict(data)
