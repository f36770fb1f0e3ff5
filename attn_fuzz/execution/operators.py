"""Which of torch's operators run: what somebody's kernel is built on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Made = TypeVar("_Made")


def operators_of(work: Callable[[], _Made]) -> tuple[_Made, tuple[str, ...]]:
    """What some work gives, and the names of torch's operators that ran for it; none where torch does not tell."""
    try:
        # The newer profiler writes to standard error.
        from torch.autograd.profiler_legacy import profile
    except ImportError:
        return work(), ()
    with profile() as seen:
        made = work()
    return made, tuple(sorted({event.key for event in seen.key_averages()}))
