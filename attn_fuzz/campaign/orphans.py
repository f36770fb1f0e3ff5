"""Processes end when the one that started them does, however that came to its end, and whatever they are doing."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def end_with_parent() -> None:
    """Has this process killed as soon as its parent is gone; does nothing in one that has no parent of this kind.

    The parent holds one end of a pipe, which the system closes with it. Where it can, the system then sends SIGKILL: a
    kernel that hangs and never gives Python its turn again would keep a thread from noticing.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # Of its own: the description of an open file may be shared with others.
    sentinel = os.dup(parent.sentinel)
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    # Also where it went before the system was told to watch.
    threading.Thread(target=_wait_for_end, args=(sentinel,), daemon=True, name="parent").start()


def _wait_for_end(sentinel: int) -> None:
    """Ends this process when the other end of a pipe is closed."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
