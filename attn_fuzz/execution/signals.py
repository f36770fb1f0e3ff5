"""Signals that end a command without a loss; imports nothing that takes time."""

from __future__ import annotations

import signal
from types import FrameType


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """A signal's handler: ends a command as Ctrl-C does, and ignores the signal from then on.

    Whoever ends a process group may say so twice, to the process and to the group. The second time may come while the
    first is being seen to, and would lose what the command has found.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
