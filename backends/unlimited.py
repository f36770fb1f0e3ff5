"""A kernel without the limits that it declares: whether they hold is tried (``backends --probe``)."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES
from attn_fuzz.reference.profile import Profile


class Unlimited(Kernel):
    """A kernel with its declared limits set aside; its conventions and promises stay.

    Args:
        kernel: the one that computes.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.name, self.compiled = kernel.name, kernel.compiled  # type: ignore[misc]
        self.call_source, self.lse_source = kernel.call_source, kernel.lse_source  # type: ignore[misc]

    def capabilities_on(self, device: str) -> Capabilities:
        return dataclasses.replace(
            self._kernel.capabilities_on(device),
            **{name: getattr(Capabilities(), name) for name in _LIMITS} | _UNDECLARED,
        )

    def profile_on(self, device: str) -> Profile:
        return self._kernel.profile_on(device)

    def paths_on(self, device: str) -> frozenset[str]:
        return self._kernel.paths_on(device)

    def why_unavailable(self, device: str) -> str | None:
        return self._kernel.why_unavailable(device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        return self._kernel.attend(q, k, v, metadata, options)


_UNDECLARED: Final = {
    "lse_gradient": True,
    "head_dims_v": True,
    "loose_max_seqlen": True,
    "gaps": ("q", "k"),
    "crowds": True,
    "far_memories": FAR_MEMORIES,
}
"""What few kernels declare, and any may be asked for."""

_CONVENTIONS: Final = {
    "arithmetic",
    "compiled_first",
    "compiles",
    "devices",
    "window_convention",
    "isolates_nonfinite",
    "lse",
    "lse_of_blind_rows",
    "placement_keeps_bits",
    "repeatable",
    "repeatable_backward",
    "covers_all_rows",
    "backward",
    "rotary_positions",
    "gradient_rows",
    "padding",
}
_LIMITS: Final = tuple(field.name for field in dataclasses.fields(Capabilities) if field.name not in _CONVENTIONS)
