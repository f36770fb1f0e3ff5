"""CUDA graphs: calls are captured once, and replayed on whatever their tensors then hold."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attn_fuzz.execution.process import context_alive, first_line, lacks_memory

Replay = Callable[[], None]


class NotCapturable(Exception):
    """A call cannot be captured: it reads lengths on the host, say. The message is one sentence."""


class Recorder(abc.ABC):
    """What captures calls."""

    @abc.abstractmethod
    def pool(self) -> Any:
        """Memory that graphs may share which are not replayed at the same time."""

    @abc.abstractmethod
    def capture(self, function: Callable[[], None], pool: Any) -> Replay:
        """Runs a function to warm up, and captures it.

        Args:
            function: what to capture; what it keeps of its results each replay writes again.
            pool: of ``pool``.

        Raises:
            NotCapturable: where it cannot be.
        """


class CudaRecorder(Recorder):
    """torch's CUDA graphs on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None], pool: Any) -> Replay:
        self._warm_up(function)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.stream(self._stream):
                # Of this thread only: others may ask the driver whatever they want.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    function()
                except Exception:
                    # What it says of a capture that has failed already is less than why.
                    with contextlib.suppress(Exception):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except Exception as error:
            self._unwind(pool)
            self._refused(error)
        return graph.replay

    def _warm_up(self, function: Callable[[], None]) -> None:
        """Runs a function twice: what loads code or measures does so once, and what waits for the device does again."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            function()
            try:
                with _no_waiting():
                    function()
            except Exception as error:
                self._refused(error)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _refused(self, error: Exception) -> None:
        """Raises NotCapturable, but what ends the context, or is a lack of memory, as it is."""
        if lacks_memory(error) or not context_alive(self._device):
            raise error
        raise NotCapturable(first_line(error)) from error

    def _unwind(self, pool: Any) -> None:
        """Tells the allocator that a capture is over which has failed; before torch 2.12 nobody else does."""
        with contextlib.suppress(Exception):
            index = self._device.index if self._device.index is not None else torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(index, pool)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """What waits for the device raises: a capture that fails leaves more behind than a call that does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def recorder_of(device: torch.device) -> Recorder | None:
    """What captures calls on a device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None
