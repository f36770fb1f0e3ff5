"""Signals that end a command without a loss; imports nothing that takes time."""

from __future__ import annotations

import ctypes
import signal
import sys
from types import FrameType
from typing import Final

_DEATH_SIGNAL: Final = 1
"""Linux's PR_SET_PDEATHSIG."""


def die_with_parent() -> None:
    """Called in a child: it is killed when its parent ends, however that is; elsewhere than on Linux it is not."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """A signal's handler: ends a command as Ctrl-C does, and ignores the signal from then on.

    Whoever ends a process group may say so twice, to the process and to the group. The second time may come while the
    first is being seen to, and would lose what the command has found.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
