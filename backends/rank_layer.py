"""The buffered layer on one of several sequence-data-parallel ranks.

Each rank holds a slice of every micro-sequence's tokens: it projects them, attends from them, and owns their K/V rows
and gradients. Keys and values are gathered over the ranks into everybody's buffer; a rank attends to the rows from its
own first active document to the end of its own slice. Backward, every rank adds to its own gradient buffer; then a
micro-sequence's rows are added up over the ranks, and each rank takes those it owns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from attn_fuzz.backends.collectives import Collectives
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.kv_buffer import KeyValueBuffer, side_by_side
from attn_fuzz.backends.layer import BufferedLayer, Layer
from attn_fuzz.backends.metadata import MicroSequenceMetadata, preprocess
from attn_fuzz.reference.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankMetadata(MicroSequenceMetadata):
    """What a rank knows of a micro-sequence: ``begin``, ``end`` and the rest describe its own slice.

    Its ``past_length`` counts what earlier micro-sequences and, in this one, earlier ranks have put into the buffer.
    """

    shared_begin: int
    """First row of the whole micro-sequence."""
    shared_end: int


def preprocess_rank(
    lengths: Sequence[int], begin: int, end: int, rank: int, ranks: int, *, causal: bool, device: torch.device
) -> RankMetadata:
    """Metadata of one rank's slice of the micro-sequence ``[begin, end)``.

    Args:
        lengths: of all documents of the packed sequence; padding counts as a last document.
        begin: first token of the micro-sequence.
        end: one past its last token.
        rank: whose slice, from 0.
        ranks: how many share the micro-sequence, in equal parts.
        causal: whether queries only look back.
        device: where tensors are made.

    Raises:
        ValueError: when the ranks cannot have equal parts, and for what ``preprocess`` refuses.
    """
    if (end - begin) % ranks or not 0 <= rank < ranks:
        raise ValueError(f"micro-sequence [{begin}, {end}) has no equal part for rank {rank} of {ranks}")
    size = (end - begin) // ranks
    own = preprocess(lengths, begin + rank * size, begin + (rank + 1) * size, causal=causal, device=device)
    fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    return RankMetadata(**fields, shared_begin=begin, shared_end=end)


class RankBuffer(KeyValueBuffer):
    """A K/V buffer whose dK and dV lie side by side, so that one collective reduces both."""

    def __init__(
        self, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, memory: str
    ) -> None:
        super().__init__(rows, kv_heads, head_dim, dtype, device, memory)
        self.gradient = torch.zeros(rows, 2, kv_heads, head_dim, dtype=torch.float32, device=device)
        self.dk, self.dv = self.gradient.unbind(1)


class RankLayer(BufferedLayer):
    """The layer of one rank; ``forward`` takes its slice of the micro-sequence ``[begin, end)``, as ``backward`` does.

    Args:
        weights: parameters, in the case's dtype; every rank has all of them.
        case: a layer case, read as configuration.
        kernel: the varlen attention to use.
        collectives: the other ranks.
    """

    buffer: RankBuffer
    buffer_type = RankBuffer

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> None:
        super().__init__(weights, case, kernel)
        self.collectives = collectives

    def preprocess(self, begin: int, end: int) -> RankMetadata:
        rank, ranks = self.collectives.rank, self.collectives.ranks
        causal, device = self.case.causal, self.device
        return preprocess_rank(self.lengths, begin, end, rank, ranks, causal=causal, device=device).transferred()

    def store(self, metadata: MicroSequenceMetadata, k: torch.Tensor, v: torch.Tensor) -> None:
        assert isinstance(metadata, RankMetadata)
        rows = self.buffer.claim(metadata.shared_begin, metadata.shared_end)
        if (both := side_by_side(*rows)) is not None:
            self.collectives.gather(torch.cat((k, v), 1), both).wait()
            return
        handles = [self.collectives.gather(own, whole) for own, whole in zip((k, v), rows, strict=True)]
        for handle in handles:
            handle.wait()

    def key_value_gradient(
        self, metadata: MicroSequenceMetadata, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(metadata, RankMetadata)
        self.buffer.accumulate(metadata.first_document_begin, metadata.end, dk, dv)
        self.reduce(metadata)
        return self.buffer.gradients(*self.own_rows(metadata))

    def own_rows(self, metadata: MicroSequenceMetadata) -> tuple[int, int]:
        """K/V rows ``[begin, end)`` of the tokens whose keys and values this rank makes."""
        return metadata.begin, metadata.end

    def reduce(self, metadata: RankMetadata) -> None:
        """Adds a micro-sequence's gradient rows up over the ranks, into the owner's rows.

        In float32, as they lie in the buffer: with one rank the sum over micro-sequences is float32 until it is stored
        once, and spreading queries over ranks must not cost digits. Each rank's share is rounded where its kernel
        stores it, and nowhere else.
        """
        gradient, rows = self.buffer.gradient, slice(*self.own_rows(metadata))
        own = torch.empty_like(gradient[rows])
        self.collectives.reduce_scatter(gradient[metadata.shared_begin : metadata.shared_end], own).wait()
        gradient[rows] = own


RankLayerFactory = Callable[[dict[str, torch.Tensor], Case, Kernel, Collectives], Layer]
"""Builds one rank's layer from weights, the case read as configuration, a kernel and the other ranks."""
