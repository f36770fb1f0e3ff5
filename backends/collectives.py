"""What ranks say to one another: gather into a slice, reduce-scatter of a slice, both with handles to wait for."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Handle(abc.ABC):
    """A collective under way; its result may be read once it has been waited for, and its operands freed."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Returns when the result is there, or, on a GPU, when what is launched next will find it there."""


class Done(Handle):
    """A collective that is over."""

    def wait(self) -> None:
        return None


class Collectives(abc.ABC):
    """The ranks that share one packed sequence.

    Args:
        rank: this one, from 0.
        ranks: how many there are.
    """

    group: dist.ProcessGroup | None = None
    """The process group below, for code that calls torch.distributed itself; None where there is none."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    @abc.abstractmethod
    def gather(self, own: torch.Tensor, whole: torch.Tensor) -> Handle:
        """Puts every rank's ``own [rows / ranks, ...]`` into everybody's ``whole [rows, ...]``, in rank order."""

    @abc.abstractmethod
    def reduce_scatter(self, whole: torch.Tensor, own: torch.Tensor) -> Handle:
        """Adds up everybody's ``whole [rows, ...]``, in its dtype; each gets its share ``own [rows / ranks, ...]``."""

    @abc.abstractmethod
    def block(self, size: int) -> Collectives:
        """The block of so many neighbours that this rank is in, when all ranks are counted off in blocks."""


class _Work(Handle):
    """Work of a process group, and what is to be done when it is over."""

    def __init__(self, work: Any, operands: tuple[torch.Tensor, ...], finish: Callable[[], object]) -> None:
        # Operands live as long as the handle: the transport reads and writes them behind Python's back.
        self._work, self._operands, self._finish = work, operands, finish

    def wait(self) -> None:
        self._work.wait()
        self._finish()


# torch 2.13 renames both, and warns of the names that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Distributed(Collectives):
    """Ranks of a torch.distributed process group: gloo or NCCL, CPU or CUDA tensors.

    Gloo has no reduce-scatter: torch has it add everything up everywhere and takes a part, which costs six times the
    processor time of exchanging the parts and adding up one's own, in rank order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self.group = group
        self._exchanges = dist.get_backend(group) == "gloo"
        self._blocks: dict[int, Distributed] = {}

    def gather(self, own: torch.Tensor, whole: torch.Tensor) -> Handle:
        own = own.contiguous()
        # Transports want contiguous memory; other buffer layouts are reached through a staging area.
        straight = whole.is_contiguous()
        target = whole if straight else torch.empty_like(whole, memory_format=torch.contiguous_format)
        work = _all_gather(target, own, group=self.group, async_op=True)
        return _Work(work, (own, target), (lambda: None) if straight else (lambda: whole.copy_(target)))

    def reduce_scatter(self, whole: torch.Tensor, own: torch.Tensor) -> Handle:
        whole = whole.contiguous()
        if self._exchanges:
            parts = torch.empty_like(whole)
            work = dist.all_to_all_single(parts, whole, group=self.group, async_op=True)
            return _Work(work, (whole, parts), lambda: own.copy_(parts.unflatten(0, (self.ranks, -1)).sum(0)))
        target = own if own.is_contiguous() else torch.empty_like(own, memory_format=torch.contiguous_format)
        work = _reduce_scatter(target, whole, op=dist.ReduceOp.SUM, group=self.group, async_op=True)
        return _Work(work, (whole, target), (lambda: None) if target is own else (lambda: own.copy_(target)))

    def block(self, size: int) -> Collectives:
        if size not in self._blocks:
            for first in range(0, self.ranks, size):
                # Every rank has to take part in making every group, its own or not.
                group = dist.new_group(list(range(first, first + size)))
                if first <= self.rank < first + size:
                    self._blocks[size] = Distributed(group)
        return self._blocks[size]
