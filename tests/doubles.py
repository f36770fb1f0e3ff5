"""Backends for tests of the oracle, the loop with one step changed; and processes that are none."""

from __future__ import annotations

from typing import Any

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.loop import Loop, attend
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case


class Double(Kernel):
    """A kernel around a loop; its capabilities are those of the loop, but for what is given."""

    name = "double"
    paths = frozenset({"loop"})

    def __init__(self, loop: Loop, path: str = "loop", **capabilities: Any) -> None:
        self.loop, self.path = loop, path
        self.capabilities = Capabilities(**capabilities)  # type: ignore[misc]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        out, lse = attend(self.loop, q, k, v, metadata, options)
        return Attended(out, lse, self.path)


def double(loop: Loop, path: str = "loop", **capabilities: Any) -> Backend:
    """A backend around a loop."""
    return Backend("double", Double(loop, path, **capabilities))


def trial(loop: Loop, case: Case, **options: Any) -> Trial:
    """A trial of a loop on the CPU."""
    return Trial(case, double(loop, **options), torch.device("cpu"))
