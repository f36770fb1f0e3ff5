"""CUDA streams: inputs that come late from one, a call on a second, and results that are taken on a third."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Final, TypeVar

import torch

_CYCLES: Final = 4_000_000
"""Of a clock of about 2 GHz, two milliseconds: ten times as long as a host takes to launch a call."""

_MOST_CALLS: Final = 16
"""Calls that a host is given the time to launch: 32 milliseconds are much beside what else is asked of a batch."""

Result = TypeVar("Result")


class Streams(abc.ABC):
    """Three streams, each of which waits for the one before it."""

    @abc.abstractmethod
    def late(self, produce: Callable[[], None], calls: int = 1) -> None:
        """Has something done on the first, but not for a while: the first of so many calls are launched before."""

    def warm_up(self, function: Callable[[], object]) -> None:
        """Runs something on the second as ``call`` does, and waits for it.

        Memory that a stream has been given once it is given again. New memory is asked of the driver, which waits for
        the device: nothing would come late any more.
        """
        self.settle()
        self.call(function)
        self.take(lambda: None)

    @abc.abstractmethod
    def settle(self) -> None:
        """Waits for what has been begun on any stream: a call's tensors are made on the default one."""

    @abc.abstractmethod
    def call(self, function: Callable[[], object]) -> None:
        """Runs something on the second, once the first is done."""

    @abc.abstractmethod
    def take(self, consume: Callable[[], Result]) -> Result:
        """Runs something on the third, once the second is done, and waits for it."""


class CudaStreams(Streams):
    """torch's streams, none of which waits for the default one by itself."""

    def __init__(self, device: torch.device) -> None:
        self._producer, self._caller, self._consumer = (torch.cuda.Stream(device) for _ in range(3))

    def settle(self) -> None:
        torch.cuda.synchronize(self._caller.device)

    def late(self, produce: Callable[[], None], calls: int = 1) -> None:
        with torch.cuda.stream(self._producer):
            torch.cuda._sleep(_CYCLES * min(calls, _MOST_CALLS))
            produce()

    def call(self, function: Callable[[], object]) -> None:
        self._caller.wait_stream(self._producer)
        with torch.cuda.stream(self._caller):
            function()

    def take(self, consume: Callable[[], Result]) -> Result:
        self._consumer.wait_stream(self._caller)
        with torch.cuda.stream(self._consumer):
            taken = consume()
        # Whatever else still runs holds memory of this call.
        torch.cuda.synchronize(self._consumer.device)
        return taken


def streams_of(device: torch.device) -> Streams | None:
    """Streams of a device; None where it has none."""
    return CudaStreams(device) if device.type == "cuda" else None
