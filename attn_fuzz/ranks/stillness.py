"""Whether processes do anything at all: ranks that wait for one another sleep, and use no processor time.

Collectives that a user's layer calls by itself are not counted (``progress``), since it may send to a single neighbour
as well; that all of those who have not come back have slept for a while says as surely that they never will.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

STILL: Final = 2.0
"""Seconds in which a process that has anything to do gets some processor time, or is seen to wait for it."""

_STATE, _USER, _SYSTEM = 0, 11, 12
"""Places in ``/proc/PID/task/TID/stat`` behind the command's name: state, and processor time in ticks."""


def asleep(pid: int, processes: Path = Path("/proc")) -> int | None:
    """Ticks of processor time of a process all of whose threads sleep; None for one that runs, or that has children.

    One that waits for the disk, is stopped, or has a process of its own that may work for it is not asleep. None, too,
    where the system does not say.
    """
    ticks = 0
    try:
        for task in (processes / str(pid) / "task").iterdir():
            told = (task / "stat").read_text().rpartition(")")[2].split()
            if told[_STATE] != "S" or (task / "children").read_text().strip():
                return None
            ticks += int(told[_USER]) + int(told[_SYSTEM])
    except (OSError, IndexError, ValueError):
        return None
    return ticks


class Stillness:
    """Looks at processes now and then, for whether they have slept all the time between.

    Args:
        pids: of all of them, by rank.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._ticks: dict[int, int] = {}
        self._since = time.monotonic()

    def lasts(self, ranks: Iterable[int]) -> bool:
        """Whether these have slept at every look for ``STILL`` seconds, without using any processor time."""
        seen = {rank: asleep(self._pids[rank]) for rank in ranks}
        now = {rank: ticks for rank, ticks in seen.items() if ticks is not None}
        if len(now) < len(seen) or now != self._ticks:
            self._ticks, self._since = now, time.monotonic()
        return bool(now) and time.monotonic() - self._since >= STILL
