"""Whether processes do anything at all: ranks that wait for one another sleep, and want next to no processor time.

Collectives that a user's layer calls by itself are not counted (``progress``), since it may send to a single neighbour
as well; that all of those who have not come back have slept for a while says as surely that they never will.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

STILL: Final = 2.0
"""Seconds in which a process that has anything to do is seen to want processor time."""

_WANTED: Final = 0.1
"""Share of that time, waits for a processor included, that the threads of a transport take to look for messages."""

_NANOSECOND: Final = 1e-9


def asleep(pid: int, processes: Path = Path("/proc")) -> float | None:
    """Seconds that a sleeping process has ever run or waited to run; None for one that does not sleep.

    Its main thread has to. One that waits for the disk, is stopped, or has a process of its own that may work for it
    does not sleep, either. None, too, where the system does not say.
    """
    wanted = 0
    try:
        for task in (processes / str(pid) / "task").iterdir():
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            main = task.name == str(pid)
            if state not in ("S" if main else "SR") or (task / "children").read_text().strip():
                return None
            ran, waited, _ = (task / "schedstat").read_text().split()
            wanted += int(ran) + int(waited)
    except (OSError, IndexError, ValueError):
        return None
    return wanted * _NANOSECOND


class Stillness:
    """Looks at processes now and then, for whether they have slept all the time between.

    Args:
        pids: of all of them, by rank.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._first: dict[int, float] = {}
        self._since = time.monotonic()

    def lasts(self, ranks: Iterable[int]) -> bool:
        """Whether these have slept at every look for ``STILL`` seconds, and have hardly wanted anything."""
        seen = {rank: asleep(self._pids[rank]) for rank in ranks}
        now = {rank: wanted for rank, wanted in seen.items() if wanted is not None}
        same = len(now) == len(seen) and now.keys() == self._first.keys()
        if not same or any(now[rank] - first > _WANTED * STILL for rank, first in self._first.items()):
            self._first, self._since = now if len(now) == len(seen) else {}, time.monotonic()
        return bool(self._first) and time.monotonic() - self._since >= STILL
