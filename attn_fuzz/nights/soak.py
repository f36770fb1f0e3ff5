"""A campaign with good and misbehaving backends that is killed again and again; what must hold after each kill.

``python -m attn_fuzz.nights.soak --seconds 1800 --kills 60 --folder soak`` prints one JSON object: what did not
hold, each point by itself, every kill, and the memory of the processes over time; ``soak/memory.png`` is a picture of
that. Exit status 0 when everything held, and 1 when something did not.
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

from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.store import Store
from attn_fuzz.nights import evenness, soak_findings, soak_memory
from attn_fuzz.nights.database import path_beside
from attn_fuzz.nights.soak_kernels import FOUND, INNOCENT, MODULE
from attn_fuzz.nights.soak_memory import Kill, Sample
from attn_fuzz.nights.soak_processes import TOKEN, memory_of, processes

GOOD: Final = ("loop", "sdpa_dense_math")
_GONE_SECONDS: Final = 60.0
"""In which processes of a supervisor that was killed have to end: workers do at once, and the one that they are forked
from once it has imported what it was importing."""

_SAMPLE_SECONDS: Final = 5.0

_OLD: Final = 10.0
"""Seconds after which a worker has loaded what it needs."""

_ALIVE_SECONDS: Final = 120.0
"""In which all workers have to be at work at the end, and to have judged something more: a campaign that has just been
started imports for half a minute on a busy machine."""

_QUIET: Final = 60.0
"""Seconds before the end without kills."""

_ENDINGS: Final = (0, 1, 3)
"""Exit statuses of a campaign that was told to end: the last one may have found nothing, or come to few backends."""

_COUNTED: Final = (("slices", "cases"), ("pairs", "cases"), ("lengths", "documents"), ("found", "times"))
"""Columns whose sums never fall."""


@dataclasses.dataclass
class Soak:
    """One of them, as it goes on."""

    folder: Path
    workers: int
    devices: tuple[str, ...]
    further: tuple[str, ...]
    """Options of the campaign."""
    seed: int
    good: tuple[str, ...] = GOOD
    wrong: list[str] = dataclasses.field(default_factory=list)
    """What did not hold."""
    kills: list[Kill] = dataclasses.field(default_factory=list)
    memory: list[Sample] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    checks: int = 0
    """Of the database's integrity."""
    found: set[str] = dataclasses.field(default_factory=set)
    starts: list[float] = dataclasses.field(default_factory=list)
    """When campaigns began."""
    seen: dict[int, float] = dataclasses.field(default_factory=dict)
    """Processes that there are, and since when."""
    alive: int = 0
    """Workers at the end."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store, self.begun = self.folder / "findings", time.monotonic()
        self.token = f"{os.getpid()}-{self.seed}"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """A campaign over the same store."""
        self.starts.append(self.now())
        names = (*self.good, *(f"{MODULE}:{name}" for name in (*FOUND, *INNOCENT)))
        command = [sys.executable, "-m", "attn_fuzz", "campaign", "--store", str(self.store), "--json"]
        command += [f"--backend={name}" for name in names] + [f"--device={device}" for device in self.devices]
        command += [f"--workers={self.workers}", f"--seed={self.seed}", *self.further]
        with (self.folder / "out.json").open("wb") as out, (self.folder / "err.txt").open("ab") as err:
            return subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, TOKEN: self.token})

    def now(self) -> float:
        """Seconds since it began."""
        return round(time.monotonic() - self.begun, 1)

    def workers_now(self) -> list[int]:
        """Children of the process that workers are forked from."""
        every = processes(self.token)
        servers = {pid for pid, parent in every.items() if parent == self.process.pid}
        return [pid for pid, parent in every.items() if parent in servers]

    def complain(self, what: str) -> None:
        """Something did not hold."""
        self.wrong.append(f"after {self.now():.0f} s: {what}")

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
            self.checks += 1
            if said != "ok":
                self.complain(f"the database is damaged: {said}")
            if not connection.execute("PRAGMA user_version").fetchone()[0]:
                return
            for table, column in _COUNTED:
                (now,) = connection.execute(f"SELECT COALESCE(SUM({column}), 0) FROM {table}").fetchone()
                if now < self.counts.get(table, 0):
                    self.complain(f"{table} fell from {self.counts[table]} to {now}")
                self.counts[table] = now

    def kill(self, random_: random.Random, supervisors: float) -> None:
        """Ends the supervisor or a worker, whatever it is doing.

        Args:
            random_: decides.
            supervisors: share of the kills that are of supervisors; where there is no worker yet, it is one.
        """
        workers = self.workers_now()
        supervisor = not workers or random_.random() < supervisors
        pid = self.process.pid if supervisor else random_.choice(workers)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            # It has just ended by itself: another one.
            self.kill(random_, supervisors)
            return
        self.kills.append(Kill(self.now(), supervisor))
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
            self.memory.append(self.sample())

    def sample(self) -> Sample:
        """The memory of all processes now."""
        parents, now, own = processes(self.token), self.now(), self.process.pid
        self.seen = {pid: self.seen.get(pid, now) for pid in parents}
        memory = {pid: memory_of(pid) for pid in parents}
        servers = {pid for pid, parent in parents.items() if parent == own}
        old = [memory[pid] for pid, parent in parents.items() if parent in servers and now - self.seen[pid] >= _OLD]
        worker = statistics.median_low(old) if old else 0
        held = sum(memory[pid] for pid in servers)
        return Sample(now, memory.get(own, 0), sum(memory.values()), len(parents), held, worker)

    def require_workers(self) -> None:
        """At the end all workers are alive, and at work."""
        self.look()
        before, deadline = self.counts.get("slices", 0), time.monotonic() + _ALIVE_SECONDS
        while time.monotonic() < deadline:
            self.alive = max(self.alive, len(self.workers_now()))
            if self.alive >= self.workers and self.counts.get("slices", 0) > before:
                return
            self.go_on(time.monotonic() + 1.0)
            self.look()
        more = self.counts.get("slices", 0) - before
        self.complain(f"{self.alive} of {self.workers} workers were alive at the end, and judged {more} more cases")

    def end(self) -> None:
        """As a scheduler ends it."""
        self.require_workers()
        self.process.terminate()
        status = self.process.wait(timeout=300)
        if status not in _ENDINGS:
            self.complain(f"the campaign ended with status {status}")
        self.require_gone()
        self.look()

    def findings(self) -> dict[str, Any]:
        """What was found; complains of what was not, and of those who were accused of nothing that they do."""
        unreadable: list[str] = []
        found = list(soak_findings.stored(self.store, unreadable))
        planted, others = soak_findings.planted(found), soak_findings.others(found)
        for name, told in planted.items():
            if not told["shrunk"]:
                how = "found, and not shrunk" if told["kept"] else f"not found to be {told['symptom']}"
                self.complain(f"{name} was {how}")
        for sentence in (*unreadable, *others):
            self.complain(sentence)
        return {"planted": planted, "others_accused": others, "stored": len(found)}

    def told(self, seconds: float) -> dict[str, Any]:
        """What came of it, ready for JSON."""
        findings, memory = self.findings(), soak_memory.flatness(self.memory, self.starts)
        if not memory["flat"]:
            self.complain("memory is not flat")
        title = f"a soak of {seconds / 60:.0f} minutes: {self.workers} workers, {len(self.kills)} kills"
        drawn = soak_memory.draw(self.folder / "memory.png", self.memory, self.starts, self.kills, title)
        return {
            "sound": not self.wrong,
            "wrong": self.wrong,
            "seconds": self.now(),
            "environment": environment(self.devices[0]),
            "devices": self.devices,
            "workers": self.workers,
            "workers_alive_at_the_end": self.alive,
            "kills": len(self.kills),
            "kills_of_supervisors": sum(kill.supervisor for kill in self.kills),
            "starts": len(self.starts),
            "integrity_checks": self.checks,
            "counts": self.counts,
            **findings,
            "memory": memory,
            "evenness": evenness.of_store(self.store),
            "picture": "memory.png" if drawn else None,
            "killed_at": self.kills,
            "started_at": self.starts,
            "samples": self.memory,
        }


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it; what came of it, ready for JSON."""
    random_ = random.Random(arguments.seed)
    further = [f"--mode={arguments.mode}", *(f"--level={level}" for level in arguments.level)]
    running = Soak(
        Path(arguments.folder),
        arguments.workers,
        tuple(arguments.device),
        tuple(further),
        arguments.seed,
        good=tuple(arguments.good) or GOOD,
    )
    last = max(arguments.seconds - _QUIET, 6.0)
    for moment in sorted(random_.uniform(5.0, last) for _ in range(arguments.kills)):
        running.go_on(running.begun + moment)
        running.kill(random_, arguments.supervisors)
    running.go_on(running.begun + arguments.seconds)
    running.end()
    return running.told(arguments.seconds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--supervisors", type=float, default=1 / 3, help="share of the kills that are of supervisors")
    parser.add_argument("--good", action="append", default=[], help="a backend that does nothing wrong")
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
