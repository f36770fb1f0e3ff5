"""How long something takes, in medians after a warm-up.

On a GPU: wall-clock seconds with the device idle before and after. On a CPU: processor time of this process, which runs
one thread, so that a busy machine measures as an idle one does.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch


def idle(device: torch.device) -> None:
    """Waits until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on the device's clock, once it is idle."""
    idle(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    started = now(device)
    work()
    return now(device) - started


def median(work: Callable[[], object], device: torch.device, repeats: int = 7, enough: float = 0.6) -> float:
    """Median seconds of several runs, after one that does not count; fewer runs once they took ``enough`` together."""
    work()
    taken: list[float] = []
    while len(taken) < repeats and (len(taken) < 1 or sum(taken) < enough):
        taken.append(once(work, device))
    return statistics.median(taken)


def processor_seconds() -> float:
    """Of processors' time that this process has taken, and those that it has waited for, since it began."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
