"""Bounds looser than the longest document, rows between documents, and documents at the end that have none."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call, Document


class PlacementFault(KernelFault):
    """Common to faults of where rows lie."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        covers_all_rows=False, loose_max_seqlen=True, gaps=("q", "k"), placement_keeps_bits=("max_seqlen",)
    )
    levels: ClassVar[tuple[str, ...]] = ("kernel",)


class KeysOfBounds(PlacementFault):
    """A call of one document is masked by max_seqlen_q and max_seqlen_k, as if those were its queries and keys."""

    id = "P01"
    reports = ("the class of transformers#45323", "the class of onnxruntime#32102")

    def shift(self, call: Call, document: Document) -> int:
        m = call.metadata
        return m.max_seqlen_k - m.max_seqlen_q if len(m.lengths_q) == 1 else super().shift(call, document)


class LseByBound(PlacementFault):
    """The LSE is kept for the longest document's rows of each, and found again in steps of max_seqlen_q."""

    id = "P02"
    reports = ("the class of nnscaler#62",)

    def saved_lse(self, call: Call, lse: torch.Tensor, document: Document) -> torch.Tensor:
        lengths = call.metadata.lengths_q
        longest = max(lengths)
        dense = lse.new_zeros(len(lse), len(lengths), longest)
        for each, (begin, end) in enumerate(self.bounds(call, "q", backward=True)):
            dense[:, each, : end - begin] = lse[:, begin:end]
        rows = document.index * call.metadata.max_seqlen_q + torch.arange(document.queries)
        return dense.flatten(1)[:, rows % (len(lengths) * longest)]


class SplitByBound(PlacementFault):
    """Keys are added up in two halves where max_seqlen_k is above the longest document, although bits are promised."""

    id = "P03"

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        half = document.seen // 2
        if not half or call.metadata.max_seqlen_k == max(call.metadata.lengths_k):
            return super().weighted(call, document, probabilities, v)
        p = probabilities.to(call.dtype).float()
        return p[..., :half] @ document.v[:, :half] + p[..., half:] @ document.v[:, half:]


class RowsOfBound(PlacementFault):
    """Rows of the longest document beyond the last whole tile are left out where the bound has a tile more."""

    id = "P04"
    reports = ("the class of TransformerEngine#3331",)
    tile: ClassVar[int] = 16

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "out" and self._tiles_more and value.shape[1] % self.tile:
            value = value.clone()
            value[:, value.shape[1] // self.tile * self.tile :] = 0
        super().write(result, rows, value, name)

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(call.metadata.lengths_q)
        self._tiles_more = call.metadata.max_seqlen_q // self.tile > -(-longest // self.tile)
        return super().forward(call, q, k, v)


class GapIsKeys(PlacementFault):
    """Keys reach to the next document's start: seqused_k is not looked at."""

    id = "P05"
    reports = ("the class of TransformerEngine#1929", "the class of flash-attention#2163")

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        if side == "q":
            return super().bounds(call, side, backward=backward)
        return list(itertools.pairwise(call.metadata.cu_seqlens_k.tolist()))

    def shift(self, call: Call, document: Document) -> int:
        # Masked as it should be: only attention that is not causal, or has nothing on its right, sees the gap.
        return call.metadata.lengths_k[document.index] - document.queries


class GapIsKeysBackward(GapIsKeys):
    """The backward alone takes rows up to the next document's start for keys."""

    id = "P06"

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        if backward:
            return super().bounds(call, side, backward=backward)
        return super(GapIsKeys, self).bounds(call, side, backward=backward)


class ShiftOfStarts(PlacementFault):
    """The causal mask is aligned by differences of the starts, as if no row behind a document were nobody's."""

    id = "P07"
    reports = ("the class of TransformerEngine#3205",)

    def shift(self, call: Call, document: Document) -> int:
        queries, keys = call.metadata.gaps
        return super().shift(call, document) + keys - queries


class StartsOfLengths(PlacementFault):
    """The output gradient is read at prefix sums of the lengths, which are no starts where there are gaps."""

    id = "P08"
    reports = ("the class of TransformerEngine#3487", "the class of Megatron-LM#5541")

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        if name == "dout" and call.metadata.gaps[0]:
            starts = [begin for begin, _ in self.bounds(call, "q", backward=True)]
            place = max(place for place, begin in enumerate(starts) if begin <= rows.start)
            begin = rows.start - place * call.metadata.gaps[0]
            rows = slice(begin, begin + rows.stop - rows.start)
        return super().read(call, x, rows, name)


class LastBeforeEmpty(PlacementFault):
    """Documents are counted up to the last prefix sum: where those at the end have no rows, one more is lost."""

    id = "P09"
    reports = ("the class of torchtitan#3893",)

    def documents(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backward: bool
    ) -> list[Document]:
        found = super().documents(call, q, k, v, backward=backward)
        empty = len(found) - max((each.index + 1 for each in found if each.queries or each.seen), default=0)
        return found[: -empty - 1] if empty else found
