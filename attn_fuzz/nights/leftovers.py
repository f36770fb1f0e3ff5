"""What workers had noted when their campaign was killed: the next one keeps it, and asks again what was running."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from uuid import uuid4

from attn_fuzz.campaign import notes
from attn_fuzz.campaign.crash_triage import crash_triage_of
from attn_fuzz.campaign.isolated import NoDevice
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.campaign.notes import Running
from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.finding import Finding
from attn_fuzz.reference.case import Case

AGAIN_SECONDS: Final = 60.0
"""For cases that ran when everything was killed: most did nothing wrong."""

PATIENCE: Final = 30.0
"""Seconds after which such a case counts as hanging, which is no finding here: it will hang again."""

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

    def clear(self) -> None:
        """Takes away the notes of workers that have ended, and all of whose findings are stored."""
        for path in self.path.iterdir():
            if path.name != _LOCK:
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


def recover(beside: Path, keep: Callable[[Finding], None], known: Callable[[Finding], bool]) -> int:
    """Keeps what campaigns that were killed had found, and asks again what they were running.

    Args:
        beside: where folders of notes are.
        keep: stores a finding.
        known: whether the store has one of the same backend and symptom, so that an unshrunk one is not needed.

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
            deadline = time.monotonic() + AGAIN_SECONDS
            for running in found.running:
                if time.monotonic() < deadline and (crash := _crash_of(running)) is not None:
                    keep(crash)
            shutil.rmtree(folder, ignore_errors=True)
    return left


def _crash_of(running: Running) -> Finding | None:
    """A finding where what was about to run ends another process, too."""
    job = Assignment(backend=running.backend, device=running.device, seed=0)
    try:
        death = crash_triage_of(job, running.trying, PATIENCE)
    except (NoDevice, LookupError, ValueError):
        return None
    if not death.again:
        return None
    return Finding(
        backend=running.backend,
        device=running.device,
        symptom="Crashed",
        checks=("runs",),
        messages=("Crashed [runs] process: a campaign ended while it ran this case, which ends another process too",),
        symptoms=({"symptom": "Crashed", "check": "runs", "tensor": "process"},),
        case=death.case,
        original_case=Case.from_json(running.trying.case),
        cases_to_find=0,
        seconds_to_find=0.0,
        environment=environment("cpu"),
    )
