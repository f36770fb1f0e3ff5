"""A campaign with good and misbehaving backends that is killed again and again; what must hold after each kill.

``python -m attn_fuzz.nights.soak --seconds 1800 --kills 60 --folder soak`` prints one JSON object: every kill, what did
not hold, which findings there are, and the memory of the processes over time. Exit status 0 when everything held.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.nights.database import path_beside
from attn_fuzz.nights.soak_kernels import FOUND, INNOCENT

GOOD: Final = ("loop", "sdpa_dense_math")
_MODULE: Final = "attn_fuzz.nights.soak_kernels"
_TOKEN: Final = "ATTN_FUZZ_SOAK"
"""An environment variable that all processes of a campaign have."""

_GONE_SECONDS: Final = 60.0
"""In which processes of a supervisor that was killed have to end: workers do at once, and the one that they are forked
from once it has imported what it was importing."""

_SAMPLE_SECONDS: Final = 5.0

_COUNTED: Final = (("slices", "cases"), ("pairs", "cases"), ("lengths", "documents"), ("found", "times"))
"""Columns whose sums never fall."""


def processes(token: str) -> dict[int, int]:
    """Processes whose environment has the token, with their parents."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{_TOKEN}={token}".encode() in (folder / "environ").read_bytes():
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                if status[0] != "Z":
                    found[int(folder.name)] = int(status[1])
        except OSError:
            # It has just ended.
            continue
    return found


def memory_of(pid: int) -> int:
    """Bytes of a process that are in memory; 0 for one that is no more."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@dataclasses.dataclass
class Soak:
    """One of them, as it goes on."""

    folder: Path
    workers: int
    devices: tuple[str, ...]
    further: tuple[str, ...]
    """Options of the campaign."""
    seed: int
    wrong: list[str] = dataclasses.field(default_factory=list)
    """What did not hold."""
    kills: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)
    """(seconds, bytes of the supervisor, bytes of all)."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    found: set[str] = dataclasses.field(default_factory=set)
    starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store, self.begun = self.folder / "findings", time.monotonic()
        self.token = f"{os.getpid()}-{self.seed}"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """A campaign over the same store."""
        self.starts += 1
        names = (*GOOD, *(f"{_MODULE}:{name}" for name in (*FOUND, *INNOCENT)))
        command = [sys.executable, "-m", "attn_fuzz", "campaign", "--store", str(self.store), "--json"]
        command += [f"--backend={name}" for name in names] + [f"--device={device}" for device in self.devices]
        command += [f"--workers={self.workers}", f"--seed={self.seed}", *self.further]
        with (self.folder / "out.json").open("wb") as out, (self.folder / "err.txt").open("ab") as err:
            return subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, _TOKEN: self.token})

    def workers_now(self) -> list[int]:
        """Children of the process that workers are forked from."""
        every = processes(self.token)
        servers = {pid for pid, parent in every.items() if parent == self.process.pid}
        return [pid for pid, parent in every.items() if parent in servers]

    def complain(self, what: str) -> None:
        """Something did not hold."""
        self.wrong.append(f"after {time.monotonic() - self.begun:.0f} s: {what}")

    def look(self) -> None:
        """What has to hold at any moment."""
        path = path_beside(self.store)
        if path.exists():
            try:
                self.compare(path)
            except sqlite3.Error as error:
                self.complain(f"the database cannot be read: {error}")
        names = set(Store(self.store).identifiers())
        if lost := self.found - names:
            self.complain(f"findings are lost: {sorted(lost)}")
        self.found |= names

    def compare(self, path: Path) -> None:
        """The database is sound, and nothing in it has become less."""
        with sqlite3.connect(path, timeout=60.0) as connection:
            (said,) = connection.execute("PRAGMA integrity_check").fetchone()
            if said != "ok":
                self.complain(f"the database is damaged: {said}")
            if not connection.execute("PRAGMA user_version").fetchone()[0]:
                return
            for table, column in (
                ("slices", "cases"),
                ("pairs", "cases"),
                ("lengths", "documents"),
                ("found", "times"),
            ):
                (now,) = connection.execute(f"SELECT COALESCE(SUM({column}), 0) FROM {table}").fetchone()
                if now < self.counts.get(table, 0):
                    self.complain(f"{table} fell from {self.counts[table]} to {now}")
                self.counts[table] = now

    def kill(self, random_: random.Random) -> None:
        """Ends the supervisor or a worker, whatever it is doing."""
        workers = self.workers_now()
        supervisor = not workers or random_.random() < 0.5
        pid = self.process.pid if supervisor else random_.choice(workers)
        self.kills.append({"at": round(time.monotonic() - self.begun, 1), "supervisor": supervisor})
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if supervisor:
            self.process.wait()
            self.require_gone()
        self.look()
        if supervisor:
            self.process = self.start()

    def require_gone(self) -> None:
        """No worker outlives its supervisor."""
        deadline = time.monotonic() + _GONE_SECONDS
        while (left := processes(self.token)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left:
            self.complain(f"{len(left)} processes outlived their campaign")
            for pid in left:
                os.kill(pid, signal.SIGKILL)

    def go_on(self, until: float) -> None:
        """Waits, and looks how much memory there is in use."""
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _SAMPLE_SECONDS))
            if self.process.poll() is not None:
                self.complain(f"the campaign ended by itself with status {self.process.returncode}")
                self.process = self.start()
            every = sum(map(memory_of, processes(self.token)))
            at = round(time.monotonic() - self.begun, 1)
            self.memory.append((at, memory_of(self.process.pid), every))

    def end(self) -> None:
        """As a scheduler ends it."""
        self.process.terminate()
        status = self.process.wait(timeout=300)
        if status != 1:
            self.complain(f"the campaign ended with status {status}, not 1 for its findings")
        self.require_gone()
        self.look()

    def accused(self) -> dict[str, list[str]]:
        """Symptoms that were found, by backend; complains of those that are not as they must be."""
        found: dict[str, set[str]] = {}
        for identifier in Store(self.store).identifiers():
            try:
                finding = Store(self.store).load(identifier)
            except StoreError as error:
                self.complain(str(error))
                continue
            found.setdefault(finding.backend.removeprefix(f"{_MODULE}:"), set()).add(finding.symptom)
        for name, symptom in FOUND.items():
            if symptom not in found.get(name, ()):
                self.complain(f"{name} was not found to be {symptom}")
        for name in found.keys() - FOUND.keys():
            self.complain(f"{name} was accused of {', '.join(sorted(found[name]))}")
        return {name: sorted(symptoms) for name, symptoms in sorted(found.items())}


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it; what came of it, ready for JSON."""
    random_ = random.Random(arguments.seed)
    further = [f"--mode={arguments.mode}", *(f"--level={level}" for level in arguments.level)]
    running = Soak(Path(arguments.folder), arguments.workers, tuple(arguments.device), tuple(further), arguments.seed)
    moments = sorted(random_.uniform(5.0, max(arguments.seconds - 30.0, 6.0)) for _ in range(arguments.kills))
    for moment in moments:
        running.go_on(running.begun + moment)
        running.kill(random_)
    running.go_on(running.begun + arguments.seconds)
    running.end()
    accused = running.accused()
    own = [supervisor for _, supervisor, _ in running.memory if supervisor]
    halves = [statistics.median(half) for half in (own[: len(own) // 2], own[len(own) // 2 :]) if half]
    return {
        "sound": not running.wrong,
        "wrong": running.wrong,
        "kills": running.kills,
        "starts": running.starts,
        "counts": running.counts,
        "accused": accused,
        "supervisor_bytes_by_half": halves,
        "memory": running.memory,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--folder", default="soak")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", action="append", default=[], help="cpu, cuda or cuda:N; default: cpu")
    parser.add_argument("--mode", default="all")
    parser.add_argument("--level", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.device = arguments.device or ["cpu"]
    report = soak(arguments)
    print(json.dumps(report))
    sys.exit(0 if report["sound"] else 1)


if __name__ == "__main__":
    main()
