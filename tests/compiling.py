"""Kernels that compile, by the clock of a test: nothing sleeps, and nothing is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Configuration
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend

COMPILING, CALLING, LIBRARIES = 3.0, 0.01, 5.0
"""Seconds: a configuration's first call, any other one, and the first of all."""

Key = Callable[[torch.Tensor, VarlenMetadata, AttentionOptions], Hashable]


def configuration(q: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions) -> Hashable:
    """What nearly all compilers specialise on, heads aside."""
    bounded = tuple(side >= 0 for side in options.window)
    return q.dtype, q.shape[2], options.causal, bounded, options.softcap > 0


class Compiling(LoopKernel):
    """The loop, which takes time when something is new to it.

    Args:
        key: of what a call is compiled for; None for a kernel that does not compile.
        deed: done to what it gives back.
        seconds: what compiling takes.
        capabilities: fields of ``Capabilities``.
    """

    def __init__(
        self,
        key: Key | None = configuration,
        deed: Callable[[torch.Tensor, AttentionOptions, Attended], Attended] | None = None,
        seconds: float = COMPILING,
        **capabilities: Any,
    ) -> None:
        self.key, self.deed, self.seconds = key, deed, seconds
        given: dict[str, Any] = {"compiles": None, **capabilities}
        self.capabilities = dataclasses.replace(LoopKernel.capabilities, **given)  # type: ignore[misc]
        # Of all of its copies.
        self._now, self.compiled = [0.0], set[Hashable]()

    @property
    def now(self) -> float:
        """Seconds, as calls make them pass."""
        return self._now[0]

    def clock(self) -> float:
        """The same."""
        return self.now

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        self._now[0] += CALLING if self.now else LIBRARIES
        key = None if self.key is None else self.key(q, metadata, options)
        if key is not None and key not in self.compiled:
            self.compiled.add(key)
            self._now[0] += self.seconds
        attended = super().attend(q, k, v, metadata, options)
        return attended if self.deed is None else self.deed(q, options, attended)


def compiling(*args: Any, **options: Any) -> Backend:
    """A backend of such a kernel."""
    return Backend("compiling", Compiling(*args, **options), levels=("kernel",))


def configurations_of(backend: Backend) -> set[Hashable]:
    """What its kernel has compiled."""
    assert isinstance(backend.kernel, Compiling)
    return backend.kernel.compiled


class NobodyBeside:
    """Stands for a process that compiles ahead, and has compiled everything when it is asked."""

    def __init__(self, subject: object, aim: object) -> None:
        self.at_work: Configuration | None = None

    def give(self, configuration: Configuration) -> None:
        self.at_work = configuration

    def taken(self) -> float | None:
        self.at_work = None
        return 0.0

    def close(self) -> None:
        self.at_work = None
