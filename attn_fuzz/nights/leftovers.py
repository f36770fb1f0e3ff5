"""What workers had noted when their campaign was killed: the next one keeps it, and asks again what was running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from uuid import uuid4

from attn_fuzz.campaign import notes
from attn_fuzz.campaign.inquest import Suspect, suspect_of
from attn_fuzz.campaign.notes import Running
from attn_fuzz.findings.finding import Finding
from attn_fuzz.nights.deaths import SUSPECT, left_behind

_LOCK: Final = "lock"
_NEW: Final = ".new"


class NotesFolder:
    """Where the workers of one campaign write their notes, locked as long as its process lives.

    Args:
        beside: folders of this name with an ending are those of all campaigns of a store.
    """

    def __init__(self, beside: Path) -> None:
        name = uuid4().hex[:12]
        self.path = beside / name
        # Nobody looks at it before it is locked.
        unlocked = beside / f"{name}{_NEW}"
        unlocked.mkdir(parents=True)
        self._lock = (unlocked / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path)

    def beginning(self, number: int) -> str:
        """What the names of a worker's notes begin with."""
        return str(self.path / f"{number}")

    def touch(self) -> None:
        """Says that the campaign is alive: what a worker has been at since long before its end is looked into first."""
        os.utime(self.path / _LOCK)

    def clear(self) -> None:
        """Takes away the notes of workers that have ended, and all of whose findings are stored."""
        for path in self.path.iterdir():
            # Of what is still being looked into, and what has just come out of it, others see to the notes.
            if path.name != _LOCK and not path.name.startswith(SUSPECT):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Takes the folder away."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


@contextlib.contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether the process that a notes folder belonged to is no more; nobody else sees to it meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(folder / _LOCK))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def recover(
    beside: Path,
    keep: Callable[[Finding], None],
    known: Callable[[Finding], bool],
    suspect: Callable[[Suspect], None],
) -> int:
    """Keeps what campaigns that were killed had found, and has looked into what they were running.

    Args:
        beside: where folders of notes are.
        keep: stores a finding.
        known: whether the store has one of the same backend and symptom, so that an unshrunk one is not needed.
        suspect: notes what may have ended its process, or hung, and has it looked into.

    Returns:
        How many campaigns had left something.
    """
    left = 0
    for folder in sorted(beside.iterdir()) if beside.is_dir() else ():
        if folder.suffix == _NEW:
            continue
        with _abandoned(folder) as abandoned:
            if not abandoned:
                continue
            left += 1
            found = notes.read(folder)
            for finding in found.found:
                keep(finding)
            for finding in found.candidates:
                if not known(finding):
                    keep(finding)
            ended = (folder / _LOCK).stat().st_mtime
            for each in (*left_behind(folder), *(_suspect_of(running, ended) for running in found.running)):
                if each is not None:
                    suspect(each)
            shutil.rmtree(folder, ignore_errors=True)
    return left


def _suspect_of(running: Running, ended: float) -> Suspect | None:
    """What a worker was about to run, for how long; None where no case can be read.

    Args:
        running: its note.
        ended: when its campaign was seen last, in seconds since 1970.
    """
    try:
        return suspect_of(running.backend, running.device, running.trying, max(ended - running.since, 0.0))
    except (LookupError, ValueError):
        return None
