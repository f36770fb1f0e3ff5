"""How much of a worker's time its calls spend compiling: told by Triton, or by a call that is far slower than others.

What has not been compiled ahead is compiled when a drawn call meets it. That time says nothing of how large batches
should be, nor of how quick a kernel is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from attn_fuzz.campaign.compile_probe import LEAST, slower
from attn_fuzz.execution.compilers import triton_variants

_CALLS: Final = 32
"""The last so many that nothing was compiled in say what a call takes."""

_KNOWN: Final = 4
"""So many say it at least; the quickest of as many does."""


class CompilingTime:
    """A clock that runs while something compiles.

    Args:
        variants: kernels that have been new to this process, as far as their compiler tells.
        clock: seconds.
    """

    def __init__(
        self, variants: Callable[[], int] = triton_variants, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._variants, self._clock = variants, clock
        self._calls: deque[float] = deque(maxlen=_CALLS)
        self._before, self._began = variants(), clock()
        self.spent = 0.0
        """Seconds of calls in which something was compiled, or loaded."""

    def begin(self) -> None:
        """A call begins; what was done since the last one counts for nothing."""
        self._before, self._began = self._variants(), self._clock()

    def end(self) -> None:
        """The call has ended, and the next one begins."""
        before, began = self._before, self._began
        self.begin()
        seconds = self._began - began
        if self._before != before or self._slow(seconds):
            self.spent += seconds
        else:
            self._calls.append(seconds)

    def _slow(self, seconds: float) -> bool:
        if seconds <= LEAST or len(self._calls) < _KNOWN:
            return False
        # At first most of them may have compiled, too, which nothing has told.
        return slower(seconds, sorted(self._calls)[len(self._calls) // _KNOWN])
