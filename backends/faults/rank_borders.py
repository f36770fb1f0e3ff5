"""Sequence-data-parallel ranks, at their borders: documents that reach over them, padding, later micro-sequences."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.collectives import Collectives
from attn_fuzz.backends.faults.fault import RankFault
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.backends.rank_layer import RankMetadata, preprocess_rank
from attn_fuzz.reference.case import Case


class CroppedToOwnSlice(RankFault):
    """Keys of a document that began on an earlier rank in the same micro-sequence are cropped to the rank's slice."""

    id = "R12"
    reports = ("the class of fla#1115",)

    def preprocess(self, begin: int, end: int) -> RankMetadata:
        made = super().preprocess(begin, end)
        if not begin <= made.first_document_begin < made.begin or not self.case.causal:
            return made
        varlen = made.varlen
        keys = (varlen.lengths_q[0], *varlen.lengths_k[1:])
        cropped = dataclasses.replace(varlen, lengths_k=keys)
        return dataclasses.replace(made, first_document_begin=made.begin, varlen=cropped)


class PaddingKnownToTheLast(RankFault):
    """Only the last rank knows where padding begins; to the others it belongs to the last document."""

    id = "R13"

    def preprocess(self, begin: int, end: int) -> RankMetadata:
        rank, ranks = self.collectives.rank, self.collectives.ranks
        if not self.case.padding or rank + 1 == ranks or not self.case.causal:
            return super().preprocess(begin, end)
        *others, last, padding = self.lengths
        merged = (*others, last + padding)
        return preprocess_rank(merged, begin, end, rank, ranks, causal=True, device=self.device)


class ReducedBefore(RankFault):
    """The reduced slice is read from the buffer of the micro-sequence taken back before, where that was as long."""

    id = "R14"
    reports = ("MagiAttention#55",)

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> None:
        super().__init__(weights, case, kernel, collectives)
        self.received: torch.Tensor | None = None

    def reduce(self, metadata: RankMetadata) -> None:
        before = self.received
        super().reduce(metadata)
        own = self.buffer.gradient[metadata.begin : metadata.end]
        self.received = own.clone()
        if before is not None and before.shape == own.shape:
            own.copy_(before)


class ValuesGatheredAtTheStart(RankFault):
    """Values of every micro-sequence are gathered into the first rows of the buffer, keys where they belong."""

    id = "R15"

    def store(self, metadata: MicroSequenceMetadata, k: torch.Tensor, v: torch.Tensor) -> None:
        assert isinstance(metadata, RankMetadata)
        keys, _ = self.buffer.claim(metadata.shared_begin, metadata.shared_end)
        values = self.buffer.v[: metadata.shared_end - metadata.shared_begin]
        for handle in (self.collectives.gather(k, keys), self.collectives.gather(v, values)):
            handle.wait()


class GradientsOfBeginningsOnly(RankFault):
    """A rank in whose slices no document begins keeps its parameter gradients out of the sum over ranks."""

    id = "R16"

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> None:
        super().__init__(weights, case, kernel, collectives)
        self.slices: list[tuple[int, int]] = []

    def preprocess(self, begin: int, end: int) -> RankMetadata:
        made = super().preprocess(begin, end)
        self.slices.append((made.begin, made.end))
        return made

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        gradients = super().parameter_gradients()
        beginnings = {sum(self.lengths[:index]) for index, length in enumerate(self.lengths) if length}
        if any(beginnings & set(range(begin, end)) for begin, end in self.slices):
            return gradients
        return {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}


class PositionsFromTheBorder(RankFault):
    """Positions of a document that began on an earlier rank count from the border; within a rank nothing is amiss."""

    id = "R17"
    reports = ("the class of Megatron-LM#673",)

    def query_key_value(self, x: torch.Tensor, position_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.collectives.rank:
            first = int(position_index[0])
            same = position_index == first + torch.arange(len(position_index), device=self.device)
            position_index = torch.where(same, position_index - first, position_index)
        return super().query_key_value(x, position_index)


class PaddingLeavesEarly(RankFault):
    """A rank whose slice is padding alone has no gradient to reduce, and does not: the others wait for it for ever."""

    id = "R18"
    reports = ("the class of vllm#43547",)

    def reduce(self, metadata: RankMetadata) -> None:
        if metadata.begin < sum(self.case.lengths):
            super().reduce(metadata)
