"""Faults of what is chosen by the whole call: a document gives other last bits in other company, though it is promised
that it does not.

All lie within every budget. What they promise holds of the loop that they change: each document is computed from a copy
of its own, which lies in memory as any other copy does.
"""

from __future__ import annotations

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call, Document

_SPLIT = 64
"""Keys from which on calls split them, and tokens from which on they take other tiles."""


class InvariantFault(KernelFault):
    """A loop that gives a document's results the same bits in any company, but for the fault."""

    capabilities = Capabilities(covers_all_rows=False, batch_invariant=True, batch_invariant_backward=True)
    levels = ("kernel",)

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        # Matrix products of a CPU round otherwise where rows begin elsewhere in memory.
        return torch.clone(super().read(call, x, rows, name), memory_format=torch.contiguous_format)


def _in_halves(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product ``[heads, rows, n] @ [heads, n, channels]`` whose sums are those of both halves, added up."""
    middle = left.shape[-1] // 2
    return left[..., :middle] @ right[..., :middle, :] + left[..., middle:] @ right[..., middle:, :]


class SplitsByLongest(InvariantFault):
    """Keys are split in two where the longest document of the call has more than 64, and so for all documents."""

    id = "C01"
    reports = ("the class of vllm#51902", "the class of flash-attention#1897")

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if call.metadata.max_seqlen_k <= _SPLIT:
            return super().weighted(call, document, probabilities, v)
        return _in_halves(probabilities.to(call.dtype).float(), document.v)


class DecodesByLongest(InvariantFault):
    """Calls of one query per document take a shortcut, whose scores are summed up in another order."""

    id = "C02"
    reports = ("the class of flash-attention#2450",)

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        if call.metadata.max_seqlen_q > 1 or document.backward:
            return super().scores(call, document)
        halves = _in_halves(document.q, document.k.transpose(-1, -2)) * call.options.scale
        if not (cap := call.options.softcap):
            return halves, halves.new_ones(1)
        tanh = torch.tanh(halves / cap)
        return cap * tanh, 1 - tanh.square()


class TilesByTokens(InvariantFault):
    """The backward takes other tiles of keys for dQ where the call has more than 64 of them, in all documents."""

    id = "C03"

    def dq(self, call: Call, document: Document, ds: torch.Tensor) -> torch.Tensor:
        if sum(call.metadata.lengths_k) <= _SPLIT:
            return super().dq(call, document, ds)
        return call.options.scale * _in_halves(ds, document.k)
