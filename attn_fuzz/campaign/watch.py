"""What a silent process is at: compiling or importing, which may take minutes, or anything else, which has hung.

A process that has said nothing for a while is sent a signal, now and then, on which it writes down where all of its
threads are. That takes no lock of the interpreter, so that one that hangs inside of a kernel's library answers, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

AFTER_SECONDS: Final = 12.0
"""Seconds of silence after which a process is asked for the first time."""

EVERY_SECONDS: Final = 4.0
"""Seconds between one time and the next."""

_TIMES: Final = 3
"""Answers that have to show no compiler before a process counts as hung early."""

_BUSY: Final = re.compile(
    rb'File "[^"]*(/triton/|/_dynamo/|/_inductor/|/cpp_extension|/cutlass/|/jax/|/jaxlib/|/tvm/|/tilelang/|/numba/'
    rb"|/cupy/|/flashinfer/jit/|/cuda/core/|/subprocess\.py|<frozen importlib)"
)
"""Code that compiles kernels, has others do so, or imports."""

_READY: Final = b"ready\n"
_SIGNAL: Final = getattr(signal, "SIGUSR1", None)
_KEPT: list[Connection] = []
"""Of this process: what it writes to is open for as long as it lives."""


def tell_where(connection: Connection) -> None:
    """Has this process write where its threads are whenever it is asked; ``connection`` is its watch's."""
    if _SIGNAL is None:
        return
    _KEPT.append(connection)
    faulthandler.register(_SIGNAL, file=connection.fileno(), all_threads=True, chain=False)
    os.write(connection.fileno(), _READY)


def _has_children(pid: int) -> bool:
    """Whether a process has started others that still run, compilers for example; False where nothing tells."""
    with contextlib.suppress(OSError):
        return any(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return False


class Watch:
    """Of one process, for as long as it lives.

    Args:
        context: how processes are started.
        clock: seconds.
    """

    def __init__(self, context: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.told, self.theirs = context.Pipe(duplex=False)
        """What the process gets (``tell_where``)."""
        os.set_blocking(self.told.fileno(), False)
        self._clock = clock
        self._ready = False
        self._asked, self.answers, self._busy = -math.inf, 0, 0.0

    def patience(self, pid: int | None, silent: float, soon: float, most: float) -> float:
        """Seconds of silence after which the process counts as hung, as far as is known now.

        Args:
            pid: of the process.
            silent: seconds for which it has said nothing.
            soon: seconds without anything that takes its time, after which it has hung.
            most: seconds that it has in any case where it does not answer, or compiles.
        """
        if silent < AFTER_SECONDS:
            self.answers, self._busy = 0, 0.0
            return most
        self._read(pid, silent)
        self._ask(pid)
        return most if self.answers < _TIMES else min(most, self._busy + soon)

    @property
    def compiled(self) -> bool:
        """Whether something took its time while it was silent for the last time."""
        return self._busy > 0

    def _read(self, pid: int | None, silent: float) -> None:
        told = b""
        with contextlib.suppress(OSError):
            while some := os.read(self.told.fileno(), 1 << 16):
                told += some
        if told.startswith(_READY):
            self._ready, told = True, told[len(_READY) :]
        if not told:
            return
        self.answers += 1
        if _BUSY.search(told) or (pid is not None and _has_children(pid)):
            self._busy = silent

    def _ask(self, pid: int | None) -> None:
        """Not before the process has said that it answers: the signal would end it."""
        if not self._ready or pid is None or _SIGNAL is None or self._clock() - self._asked < EVERY_SECONDS:
            return
        self._asked = self._clock()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _SIGNAL)
