"""Offsets that do not fit: of rows and heads that lie far apart, and of an allocation's later half."""

from __future__ import annotations

from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call
from attn_fuzz.reference.case import FAR_MEMORIES

_BITS = 31


class FarFault(KernelFault):
    """Common to faults of offsets: those of one tensor's rows lose their high bits."""

    capabilities: ClassVar[Capabilities] = Capabilities(covers_all_rows=False, far_memories=FAR_MEMORIES)
    levels: ClassVar[tuple[str, ...]] = ("kernel",)
    tensor: ClassVar[str]

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        return super().read(call, self.wrapped(x) if name == self.tensor else x, rows, name)

    def wrapped(self, x: torch.Tensor) -> torch.Tensor:
        """Every row of a tensor as it is found."""
        return torch.stack([_at(row, row.storage_offset() - x.storage_offset(), x) for row in x]) if far(x) else x


def far(x: torch.Tensor) -> bool:
    """Whether some offset within a tensor needs more bits."""
    return len(x) > 0 and sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) >> _BITS > 0


def _at(part: torch.Tensor, offset: int | torch.SymInt, x: torch.Tensor) -> torch.Tensor:
    """A part of a tensor where its offset says, of which the low bits are kept."""
    return part.as_strided(part.shape, part.stride(), x.storage_offset() + offset % (1 << _BITS))


class KeyRowsWrap(FarFault):
    """Offsets of rows of K are kept in 31 bits."""

    id, tensor = "P10", "k"
    reports = ("the class of pytorch#187227", "the class of flash-attention#1500")


class GradientRowsWrap(FarFault):
    """Offsets of rows of the output gradient are kept in 31 bits: the forward is right."""

    id, tensor = "P11", "dout"
    reports = ("the class of pytorch#162588", "the class of flash-attention#2611")


class HeadsWrap(FarFault):
    """Offsets of heads of Q are kept in 31 bits."""

    id, tensor = "P12", "q"
    reports = ("the class of flash-linear-attention#1080", "the class of SageAttention#386")

    def wrapped(self, x: torch.Tensor) -> torch.Tensor:
        heads = [x[:, head] for head in range(x.shape[1])]
        found = [_at(each, each.storage_offset() - x.storage_offset(), x) for each in heads]
        return torch.stack(found, 1) if far(x) else x


class BaseWraps(FarFault):
    """Where Q begins in its allocation is kept in 31 bits."""

    id, tensor = "P13", "q"
    reports = ("the class of aiter#4126",)

    def wrapped(self, x: torch.Tensor) -> torch.Tensor:
        return x.as_strided(x.shape, x.stride(), x.storage_offset() % (1 << _BITS))
