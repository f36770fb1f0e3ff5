"""Teams of rank processes, as the parent sees them: called together, replaced when one of them dies or hangs."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.ranks.client import Client, HostError
from attn_fuzz.ranks.pickling import packed, unpacked
from attn_fuzz.ranks.progress import Progress
from attn_fuzz.ranks.rank_process import Failure, Seat
from attn_fuzz.ranks.stillness import Stillness

PATIENCE: Final = 120.0
"""Seconds after which silent ranks count as hung: below a campaign's own patience, above what a JIT compiler takes."""

QUICK_PATIENCE: Final = 30.0
"""The same where nothing is compiled: a thousand times what a case takes on the CPU."""

GRACE: Final = 0.5
"""Seconds that the others have to fail too, once one rank has: what one died of explains what the others raised."""

SETTLED: Final = 1.0
"""Seconds that ranks have to come back on their own, once it is certain that they are out of step."""

_LOOK: Final = 0.1
"""Seconds between looks at what ranks are waiting for."""


class RankFailed(RuntimeError):
    """A rank raised, or its process died; the message says which and how."""


class RanksHung(RuntimeError):
    """Ranks did not answer in time."""


def seats(device: torch.device, ranks: int, folder: Path) -> list[Seat]:
    """Where the ranks of a group sit: NCCL with a GPU each where there are enough, otherwise gloo on one device."""
    files = str(folder / "store"), str(folder / "progress")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus >= ranks and dist.is_nccl_available():
        first = device.index or 0
        return [Seat(rank, ranks, f"cuda:{(first + rank) % gpus}", "nccl", *files) for rank in range(ranks)]
    place = f"cuda:{device.index or 0}" if device.type == "cuda" else str(device)
    return [Seat(rank, ranks, place, "gloo", *files) for rank in range(ranks)]


def _back(answers: Mapping[int, Any]) -> str:
    """Which ranks came back, in words."""
    return f", {', '.join(map(str, sorted(answers)))} came back" if answers else ""


class RankGroup:
    """Processes that share a process group.

    Args:
        host: where they are forked from.
        ranks: how many.
        device: of the first one.
    """

    def __init__(self, client: Client, ranks: int, device: torch.device) -> None:
        self._client, self._ranks = client, ranks
        self._folder = tempfile.TemporaryDirectory(prefix="attn-fuzz-ranks-")
        pairs = [Pipe() for _ in range(ranks)]
        self._connections: list[Connection] = [ours for ours, _ in pairs]
        places = seats(device, ranks, Path(self._folder.name))
        self._progress = Progress(places[0].progress, ranks)
        self.transport = places[0].transport
        try:
            self.pids = client.fork(
                [dataclasses.asdict(seat) for seat in places], [there.fileno() for _, there in pairs]
            )
        finally:
            for _, theirs in pairs:
                theirs.close()
        self.loaded: set[str] = set()
        """Backends that its ranks have imported."""
        self.uneven: str | None = None
        """The backend under which ranks have begun other numbers of messages, if one has."""

    def call(
        self, function: Callable[..., Any], arguments: Sequence[Any], seconds: float, *, awake: bool = False
    ) -> list[Any]:
        """``function(*arguments)`` in every rank; the results by rank.

        Args:
            function: importable by its name.
            arguments: of it.
            seconds: after which silent ranks count as hung.
            awake: ranks that do nothing at all for a while count as hung, too.

        Raises:
            RankFailed: when a rank raised or died.
            RanksHung: when some have not answered in time, or never will.
            MisshapenResult: when a rank's layer returned something else than it should.
            HostError: when the process that forked them is gone.
            UnsupportedCase: when a rank refused.
            torch.OutOfMemoryError: when one had too little memory.
        """
        data = packed((function, tuple(arguments)))
        for connection in self._connections:
            try:
                connection.send_bytes(data)
            except OSError:
                # It is dead, which the answer that it does not give says.
                continue
        answers, dead, still = self._answers(time.monotonic() + seconds, awake=awake)
        failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
        if dead:
            codes = self._client.end(self.pids)
            self.pids = []
            raise RankFailed(f"rank {dead[0]} of {self._ranks} died with exit code {codes[dead[0]]}")
        if failures:
            self._raise(*min(failures.items()))
        silent = [str(rank) for rank in range(self._ranks) if rank not in answers]
        if apart := self._out_of_step(sorted(answers)):
            raise RanksHung(f"of {self._ranks} ranks, {apart}")
        if still:
            raise RanksHung(f"of {self._ranks} ranks, {', '.join(silent)} wait for what never comes{_back(answers)}")
        if silent:
            raise RanksHung(f"of {self._ranks} ranks, {', '.join(silent)} did not answer within {seconds:g} seconds")
        return [answers[rank] for rank in range(self._ranks)]

    def _raise(self, rank: int, failure: Failure) -> NoReturn:
        """Raises what a rank has."""
        if failure.kind == "refused":
            raise UnsupportedCase(failure.message)
        if failure.kind == "memory":
            raise torch.OutOfMemoryError(failure.message)
        if failure.kind == "misshapen":
            raise MisshapenResult(f"on rank {rank} of {self._ranks}, {failure.message}")
        raise RankFailed(f"rank {rank} of {self._ranks} raised {failure.type}: {failure.message}{failure.place}")

    def _answers(self, deadline: float, *, awake: bool) -> tuple[dict[int, Any], list[int], bool]:
        """(what each rank said, ranks that died, whether the others sleep), as far as it has come by the deadline."""
        answers: dict[int, Any] = {}
        dead: list[int] = []
        open_ones = {connection: rank for rank, connection in enumerate(self._connections)}
        certain, stillness = False, Stillness(self.pids)
        while open_ones and (left := deadline - time.monotonic()) > 0:
            if not certain:
                certain, left = self._out_of_step(sorted(answers)) is not None, min(left, _LOOK)
                # Others may yet come back.
                deadline = min(deadline, time.monotonic() + SETTLED) if certain else deadline
            ready = wait(list(open_ones), timeout=left)
            if awake and not ready and stillness.lasts(open_ones.values()):
                return answers, sorted(dead), True
            for connection in ready:
                rank = open_ones.pop(connection)  # type: ignore[call-overload]
                try:
                    answers[rank] = unpacked(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    dead.append(rank)
                if rank in dead or isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers, sorted(dead), False

    def _out_of_step(self, back: Sequence[int]) -> str | None:
        """Which ranks call different collectives, or do without the last ones of others.

        Args:
            back: the ranks that have come back; the counts of others still grow.
        """
        if (pair := self._progress.at_odds()) is not None:
            return f"{pair[0]} and {pair[1]} met in different collective calls: one gathers where the other reduces"
        counts = self._progress.counts()
        fewest = min(back, key=lambda rank: counts[rank], default=0)
        most = max(range(self._ranks), key=lambda rank: counts[rank])
        if not back or counts[most] <= counts[fewest]:
            return None
        missing = counts[most] - counts[fewest]
        return f"{fewest} came back without taking part in the last {missing} collective calls of {most}"

    def end(self) -> None:
        """Kills what is left of it."""
        for connection in self._connections:
            connection.close()
        if self.pids:
            # A host that is gone took them along.
            with contextlib.suppress(HostError):
                self._client.end(self.pids)
            self.pids = []
        self._folder.cleanup()


class RankGroups:
    """The groups of this process, one for each number of ranks on each device, started when first needed."""

    def __init__(self) -> None:
        self._client = Client()
        self._rank_groups: dict[tuple[int, str], RankGroup] = {}

    def group(self, ranks: int, device: torch.device) -> RankGroup:
        """The group, alive as far as is known."""
        key = (ranks, str(device))
        if key not in self._rank_groups:
            self._rank_groups[key] = RankGroup(self._client, ranks, device)
        return self._rank_groups[key]

    def call(
        self,
        ranks: int,
        device: torch.device,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        seconds: float = PATIENCE,
        *,
        awake: bool = False,
    ) -> list[Any]:
        """``RankGroup.call``; a group in which anything went wrong is replaced, since its ranks may be out of step."""
        group = self.group(ranks, device)
        try:
            return group.call(function, arguments, seconds, awake=awake)
        except HostError:
            # All ranks of all groups ended with it.
            self.close()
            raise
        except BaseException:
            self.replace(ranks, device)
            raise

    def replace(self, ranks: int, device: torch.device) -> None:
        """Ends a group; the next call has a new one."""
        self._rank_groups.pop((ranks, str(device))).end()

    def close(self) -> None:
        """Ends all groups and the host."""
        for group in self._rank_groups.values():
            group.end()
        self._rank_groups.clear()
        self._client.close()


_mine: tuple[int, RankGroups] | None = None


def rank_groups() -> RankGroups:
    """This process's groups; they end with it."""
    global _mine
    if _mine is None or _mine[0] != os.getpid():
        _mine = (os.getpid(), RankGroups())
        atexit.register(_mine[1].close)
    return _mine[1]
