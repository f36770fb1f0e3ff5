"""A campaign on another machine: a process with a store of its own, which is asked now and then for what is new.

An object of this class lives there, as a Ray actor or in a test; it knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Final

import attn_fuzz
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.signals import die_with_parent
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.nights.database import Database, path_beside
from attn_fuzz.nights.handed import Handed, Piece, Totals, read, since

COUNTS_SECONDS: Final = 10.0
"""Between readings of what was counted, each of which takes some tenths of a second. Findings do not wait."""

WAIT_SECONDS: Final = 1.0
"""For which an answer waits for something new."""

END_SECONDS: Final = 30.0
"""For a campaign that was told to end: it gives what it is at ten seconds, and writes."""

_LOOK_SECONDS: Final = 0.2


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a machine is to do."""

    device: str
    """``cpu`` or ``cuda``: those that its process can see."""
    workers: int
    seed: int
    seconds: float
    backends: tuple[str, ...] = ()
    """None for all that run there."""
    levels: tuple[str, ...] = ()
    mode: str = "all"

    def words(self, store: Path) -> list[str]:
        """Of the command line."""
        given = [("--backend", name) for name in self.backends] + [("--level", level) for level in self.levels]
        numbers = (("--workers", self.workers), ("--seed", self.seed), ("--seconds", max(self.seconds, 1.0)))
        named = (("--device", self.device), ("--mode", self.mode), ("--store", store))
        return ["campaign", "--json", *(str(word) for pair in (*given, *numbers, *named) for word in pair)]


def _environment() -> dict[str, str]:
    """Of a campaign: this package as this process has it; what Ray tells its processes of threads is not for others."""
    here = str(Path(attn_fuzz.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return {**{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}, "PYTHONPATH": path}


class Node:
    """One machine's part.

    Args:
        name: of its folder, which an earlier one at the same place may have left behind, with findings.
    """

    def __init__(self, name: str) -> None:
        self._folder = Path(tempfile.gettempdir()) / name
        self._store = Store(self._folder / "findings")
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._before: Totals | None = None
        self._counted = 0.0
        self._handed: dict[str, str] = {}
        """Text of each finding that was handed over, by id."""

    def about(self, device: str) -> dict[str, str]:
        """The version there, and device and versions of what runs there."""
        return {"attn_fuzz": attn_fuzz.__version__, **environment(device)}

    def begin(self, orders: Orders, database: bytes) -> None:
        """Starts a campaign.

        Args:
            orders: what it is to do.
            database: what all machines have counted until now, so that it goes on where they are.
        """
        self._store.prepare()
        path = path_beside(self._store.folder)
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        path.write_bytes(database)
        with Database(path) as opened:
            self._before = read(opened)
        self._counted = time.monotonic()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attn_fuzz", *orders.words(self._store.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=_environment(),
            preexec_fn=die_with_parent,
        )

    def take(self) -> Handed:
        """What is new: at once if there is something, else after a second."""
        assert self._process is not None
        until = time.monotonic() + WAIT_SECONDS
        while self._process.poll() is None and time.monotonic() < until and not self._new():
            time.sleep(_LOOK_SECONDS)
        status = self._process.poll()
        # All that it wrote before it ended is there now.
        findings = self._new()
        due = status is not None or findings or time.monotonic() - self._counted > COUNTS_SECONDS
        pieces = self._count() if due else []
        self._handed |= findings
        told = [json.loads(text) for text in findings.values()]
        return Handed(pieces, told, status is None, status, self._last_words() if status is not None else "")

    def end(self) -> Handed:
        """Tells the campaign to end, and hands over all that is left."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self.take()

    def close(self) -> None:
        """Takes away what it has on the disk: all of it was handed over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _new(self) -> dict[str, str]:
        """Texts of findings that are new or have changed."""
        found: dict[str, str] = {}
        for identifier in self._store.identifiers():
            with contextlib.suppress(StoreError, OSError):
                # One that cannot be read is told by the campaign there.
                text = json.dumps(self._store.load(identifier).to_dict())
                if self._handed.get(identifier) != text:
                    found[identifier] = text
        return found

    def _count(self) -> list[Piece]:
        with Database(path_beside(self._store.folder), create=False) as database:
            now = read(database)
        before, self._before, self._counted = self._before, now, time.monotonic()
        assert before is not None
        return since(now, before)

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if line.startswith("attn-fuzz:")), lines[-1] if lines else "")
