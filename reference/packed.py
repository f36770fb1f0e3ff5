"""The lengths of a packed call as tensors, for references and checks; made once per call and device.

Not for kernels: what those are handed they may write to, and these are shared.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where the documents of one side of a call lie."""

    bounds: torch.Tensor
    """int32 ``[documents + 1]``: where each document begins, and where the last one ends."""
    owner: torch.Tensor
    """int64 ``[tokens]``: the document of each row."""
    longest: int


@functools.lru_cache(maxsize=8)
def packed(lengths: tuple[int, ...], device: torch.device) -> Packed:
    """The lengths of at least one document, on a device; nothing here waits for it."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=bounds[1:])
    tokens = int(bounds[-1])
    placed = counts.to(device, non_blocking=True)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), placed, output_size=tokens)
    return Packed(bounds.to(device, non_blocking=True), owner, int(counts.max()))
