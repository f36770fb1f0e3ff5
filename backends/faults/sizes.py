"""Sizes that large models have and small tests do not: what a kernel keeps for so many heads or rows is too small."""

from __future__ import annotations

from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.loop import Call, Document, Gradients

_TILE = 8
_WARP = 32
_ROWS = 2048


class GroupBeyondTile(KernelFault):
    """A tile has room for eight query heads of a group: those beyond are given the first ones' probabilities."""

    id = "X40"
    reports: ClassVar[tuple[str, ...]] = ("the class of hpc-ops#58", "the class of vllm-xpu-kernels#409")
    counted: ClassVar[int] = _TILE
    """Query heads of a group that are told apart."""

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        head = torch.arange(len(probabilities))
        of_group = head % call.group
        return super().weighted(call, document, probabilities[head - of_group + of_group % self.counted], v)


class HeadsBeyondWarp(KernelFault):
    """Row sums of dO O are kept for 32 heads, one for each thread of a warp: head h takes those of head h % 32."""

    id = "X41"

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        delta = super().delta(call, document, out, dout)
        return delta[torch.arange(len(delta)) % _WARP]


class RowsWrap(KernelFault):
    """Query rows of a document are counted in 11 bits: row 2,048 is given row 0's probabilities, forward only."""

    id = "X42"
    reports = ("the class of pytorch#162588",)

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        row = torch.arange(document.queries) % _ROWS
        return super().weighted(call, document, probabilities[:, row], v)


class LateRowsLeftOut(KernelFault):
    """dK and dV leave out a document's query rows from the 2,048th on; dQ has all of them."""

    id = "X43"

    def backward(
        self,
        call: Call,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
    ) -> Gradients:
        gradients = super().backward(call, q, k, v, out, lse, dout)
        if call.metadata.max_seqlen_q <= _ROWS:
            return gradients
        # What a row puts into dK and dV is a multiple of its gradient.
        early = dout.clone()
        for begin, end in self.bounds(call, "q", backward=True):
            early[begin + _ROWS : end] = 0
        return (gradients[0], *super().backward(call, q, k, v, out, lse, early)[1:])
