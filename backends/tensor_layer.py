"""Tensor parallelism of query heads, with sequence-parallel keys and values for the single K/V head that they share.

A block of ``tensor_ranks`` neighbours shares one slice of every micro-sequence: each rank holds the tokens of a part of
it and the weights of a part of the query heads. The input is gathered over the block before the query projection; the
K/V projection, which every rank has whole, sees own tokens only, so that keys and values are gathered over all ranks,
as without tensor parallelism. The output projection's partial sums are reduce-scattered over the block.
"""

from __future__ import annotations

import torch

from attn_fuzz.backends.collectives import Collectives
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.backends.rank_layer import RankLayer, RankMetadata, preprocess_rank
from attn_fuzz.reference.case import Case


def _gathered(own: torch.Tensor, block: Collectives) -> torch.Tensor:
    whole = own.new_empty(block.ranks * len(own), *own.shape[1:])
    block.gather(own, whole).wait()
    return whole


def _summed(partial: torch.Tensor, block: Collectives) -> torch.Tensor:
    """The block's sum of this rank's rows, added up in float32 like every other sum over ranks, and stored once."""
    own = torch.empty(len(partial) // block.ranks, *partial.shape[1:], dtype=torch.float32, device=partial.device)
    block.reduce_scatter(partial.float(), own).wait()
    return own.to(partial.dtype)


class GatherTokens(torch.autograd.Function):
    """``[tokens, ...]`` of each rank of a block to those of all; its gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, own: torch.Tensor, block: Collectives) -> torch.Tensor:
        ctx.block = block  # type: ignore[attr-defined]
        return _gathered(own, block)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _summed(gradient, ctx.block), None  # type: ignore[attr-defined]


class ScatterSums(torch.autograd.Function):
    """Partial sums ``[all tokens, ...]`` to each rank's whole sums of its own tokens; the gradient is gathered."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, partial: torch.Tensor, block: Collectives) -> torch.Tensor:
        ctx.block = block  # type: ignore[attr-defined]
        return _summed(partial, block)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gathered(gradient, ctx.block), None  # type: ignore[attr-defined]


class TensorLayer(RankLayer):
    """The layer of one rank of a block; ``forward`` takes the tokens that are its own, and gives their output.

    Args:
        weights: all parameters, of which it keeps its share: rows of ``query``, columns of ``dense``, the rest whole.
        case: a layer case with one K/V head.
        kernel: the varlen attention to use.
        collectives: all ranks, in the order of their tokens.
    """

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> None:
        self.block = collectives.block(case.tensor_ranks)
        width = case.heads // case.tensor_ranks * case.head_dim
        mine = slice(self.block.rank * width, (self.block.rank + 1) * width)
        shares = {"query": weights["query"][mine], "dense": weights["dense"][:, mine].contiguous()}
        super().__init__({**weights, **shares}, case, kernel, collectives)
        self.heads = case.heads // case.tensor_ranks

    def preprocess(self, begin: int, end: int) -> RankMetadata:
        rank, ranks = self.collectives.rank // self.block.ranks, self.collectives.ranks // self.block.ranks
        return preprocess_rank(self.lengths, begin, end, rank, ranks, causal=self.case.causal, device=self.device)

    def own_rows(self, metadata: MicroSequenceMetadata) -> tuple[int, int]:
        size = (metadata.end - metadata.begin) // self.block.ranks
        begin = metadata.begin + self.block.rank * size
        return begin, begin + size

    def own_positions(self, position_index: torch.Tensor) -> torch.Tensor:
        return position_index.chunk(self.block.ranks)[self.block.rank]

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name == "query":
            x = GatherTokens.apply(x, self.block)
        y = super().project(x, name)
        return ScatterSums.apply(y, self.block) if name == "dense" else y


def rank_layer(weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> RankLayer:
    """The correct layer of one rank, with tensor parallelism where the case has it."""
    return (TensorLayer if case.tensor_ranks > 1 else RankLayer)(weights, case, kernel, collectives)
