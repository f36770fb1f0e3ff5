"""Deaths and silences of workers, looked into beside the campaign: one at a time, none forgotten when it is killed.

A round does not wait for it. What is known of a suspect is a file in the campaign's folder of notes, written anew
whenever an inquest has come a step further: a campaign that is killed loses one step, and the next one goes on there.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from attn_fuzz.campaign import notes
from attn_fuzz.campaign.inquest import Inquest, Suspect, look_into
from attn_fuzz.campaign.pool import HANG_SECONDS
from attn_fuzz.findings.finding import Finding

SUSPECT: Final = "suspect-"
"""What the names of these files begin with."""

PATIENCE: Final = 30.0
"""Seconds after which a case counts as hanging, on a CPU and of what does not compile: its process has loaded
everything before."""

_KNOWN_PATIENCE: Final = 5.0
"""The same where it is known that the backend hangs, and nothing would come of it but that."""


class Deaths:
    """Looks into suspects.

    Args:
        folder: of the campaign's notes.
        compiled: backends that may compile for minutes.
        known: (backend, symptom) of what needs no other finding.
    """

    def __init__(self, folder: Path, compiled: Collection[str] = (), known: Collection[tuple[str, str]] = ()) -> None:
        self._folder, self._compiled, self._known = folder, frozenset(compiled), set(known)
        self._pending: dict[Path, Suspect] = {}
        self._news: list[tuple[Finding | str, Path]] = []
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._thread: threading.Thread | None = None
        self._ended = False

    def add(self, suspect: Suspect) -> None:
        """Has a suspect looked into, once it is noted; one like it that waits already is enough."""
        with self._lock:
            if any(_alike(suspect, other) for other in self._pending.values()):
                return
            path = self._folder / f"{SUSPECT}{next(self._numbers)}"
            _write(path, suspect.to_dict())
            self._pending[path] = suspect
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, daemon=True, name="deaths")
                self._thread.start()

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
        if self._thread is not None:
            self._thread.join(max(seconds, 0.0))
        with self._lock:
            self._ended = True
            sure = {path: suspect for path, suspect in self._pending.items() if suspect.sure}
            for path in sure:
                del self._pending[path]
        return [suspect.finding for suspect in sure.values()]

    # In a thread of its own.

    def _next(self) -> tuple[Path, Suspect] | None:
        """What most is known against; None where there is nothing more, and the thread ends."""
        with self._lock:
            if self._ended or not self._pending:
                self._thread = None
                return None
            return max(self._pending.items(), key=lambda item: (item[1].confirmed, item[1].sure, item[1].silence))

    def _work(self) -> None:
        while (found := self._next()) is not None:
            self._tell(found[0], self._looked_into(*found))

    def _looked_into(self, path: Path, suspect: Suspect) -> Finding | str:
        backend, device = suspect.finding.backend, suspect.finding.device
        known = {symptom for name, symptom in self._known if name == backend}
        patience = HANG_SECONDS if device != "cpu" or backend in self._compiled else PATIENCE
        if "Hung" in known and not suspect.sure:
            patience = _KNOWN_PATIENCE
        return look_into(Inquest(suspect, patience, lambda more: self._learn(path, more), known))

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
