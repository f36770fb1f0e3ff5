"""Tensor-parallel ranks: whose positions, whose sums."""

from __future__ import annotations

import torch

from attn_fuzz.backends.collectives import Collectives
from attn_fuzz.backends.faults.fault import TensorFault
from attn_fuzz.backends.rank_layer import RankLayer, RankMetadata
from attn_fuzz.backends.tensor_layer import GatherTokens, ScatterSums


class FirstRanksPositions(TensorFault):
    """Keys are rotated by the positions of the block's first rank's tokens."""

    id = "T01"

    def own_positions(self, position_index: torch.Tensor) -> torch.Tensor:
        return position_index.chunk(self.block.ranks)[0]


class PartialOutput(TensorFault):
    """The output projection's partial sums are taken for the whole: other ranks' heads are missing from the output."""

    id = "T02"

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name != "dense":
            return super().project(x, name)
        return RankLayer.project(self, x, name).chunk(self.block.ranks)[self.block.rank]


class _GatherOnly(GatherTokens):
    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        block: Collectives = ctx.block  # type: ignore[attr-defined]
        return gradient.chunk(block.ranks)[block.rank], None


class InputGradientUnsummed(TensorFault):
    """The gathered input's gradient is cut up instead of reduce-scattered: it lacks the other ranks' query heads."""

    id = "T03"

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name == "query":
            return RankLayer.project(self, _GatherOnly.apply(x, self.block), name)
        y = RankLayer.project(self, x, name)
        return ScatterSums.apply(y, self.block) if name == "dense" else y


class KeyGradientUnsummed(TensorFault):
    """K/V gradients are not added up over the ranks: each has that of its own query heads only."""

    id = "T04"

    def reduce(self, metadata: RankMetadata) -> None:
        return None
