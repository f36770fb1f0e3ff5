"""Graphs and streams on a CPU: operators are recorded and run again, and inputs come when somebody waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attn_fuzz.execution.graphs import NotCapturable, Recorder, Replay
from attn_fuzz.execution.streams import Result, Streams

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""What gives the host, or a shape, what is in a tensor."""


class _Recording(TorchDispatchMode):
    """Operators in the order in which they ran, with the very tensors that they took and gave."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _READS:
            raise NotCapturable(f"{function} reads what is on the device")
        given = kwargs or {}
        result = function(*args, **given)
        self._steps.append((function, args, given, result))
        return result

    def replay(self) -> None:
        """Runs all of them again; what is new memory is copied to where it was the first time."""
        with torch.no_grad():
            for function, args, kwargs, before in self._steps:
                after = function(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() != (
                        new.untyped_storage().data_ptr()
                    ):
                        old.copy_(new)


class FakeRecorder(Recorder):
    """Captures what runs through torch's dispatcher."""

    def __init__(self) -> None:
        self.captured = 0

    def pool(self) -> Any:
        return None

    def capture(self, function: Callable[[], None], pool: Any) -> Replay:
        function()
        with _Recording() as recording:
            function()
        self.captured += 1
        return recording.replay


class FakeStreams(Streams):
    """Inputs come when a kernel waits for its stream, and at the latest when its call is over."""

    current: FakeStreams | None = None
    """Those of the call that is made."""

    def __init__(self) -> None:
        self._late: list[Callable[[], None]] = []

    def wait(self) -> None:
        """What is launched on the current stream comes after all that was."""
        while self._late:
            self._late.pop()()

    def settle(self) -> None:
        self.wait()

    def late(self, produce: Callable[[], None], calls: int = 1) -> None:
        self._late.append(produce)

    def call(self, function: Callable[[], object]) -> None:
        FakeStreams.current = self
        try:
            function()
        finally:
            FakeStreams.current = None
        self.wait()

    def take(self, consume: Callable[[], Result]) -> Result:
        return consume()
