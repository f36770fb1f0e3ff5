"""Sequence-data-parallel ranks: whose rows, which past, when a collective is over, in which precision it adds."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import ClassVar

import torch

from attn_fuzz.backends.collectives import Collectives, Handle
from attn_fuzz.backends.faults.fault import RankFault
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.backends.rank_layer import RankMetadata, preprocess_rank
from attn_fuzz.reference.case import Case


class StalePast(RankFault):
    """The last rank's past length leaves out what earlier ranks have put into the buffer."""

    id = "R01"
    reports = ("the class of fla#1115",)

    def preprocess(self, begin: int, end: int) -> RankMetadata:
        made = super().preprocess(begin, end)
        if self.collectives.rank + 1 < self.collectives.ranks or not self.case.causal:
            return made
        stale = preprocess_rank(
            self.lengths, begin, begin + made.end - made.begin, 0, 1, causal=True, device=self.device
        )
        return dataclasses.replace(stale, shared_begin=begin, shared_end=end)


class _OtherReduction(RankFault):
    """A micro-sequence's gradient rows are added up over the ranks, and then put where they do not belong."""

    def reduced(self, metadata: RankMetadata) -> torch.Tensor:
        """The sum over ranks of this rank's rows ``[rows, 2, kv_heads, head_dim]``."""
        gradient = self.buffer.gradient
        own = torch.empty_like(gradient[metadata.begin : metadata.end])
        self.collectives.reduce_scatter(gradient[metadata.shared_begin : metadata.shared_end], own).wait()
        return own


class SliceOfTheNext(_OtherReduction):
    """A rank's reduced gradient slice is kept at the next rank's offset."""

    id = "R02"
    reports = ("pytorch#152625", "fla#1115")

    def reduce(self, metadata: RankMetadata) -> None:
        own, size = self.reduced(metadata), metadata.end - metadata.begin
        begin = metadata.begin + size if metadata.end < metadata.shared_end else metadata.shared_begin
        self.buffer.gradient[begin : begin + size] = own


class GatheredBackwards(RankFault):
    """Gathered keys and values lie in the buffer with the last rank's first."""

    id = "R03"

    def store(self, metadata: MicroSequenceMetadata, k: torch.Tensor, v: torch.Tensor) -> None:
        super().store(metadata, k, v)
        assert isinstance(metadata, RankMetadata)
        for buffer in (self.buffer.k, self.buffer.v):
            rows = buffer[metadata.shared_begin : metadata.shared_end].unflatten(0, (self.collectives.ranks, -1))
            rows.copy_(rows.flip(0))


class OthersNotKept(RankFault):
    """Of the last micro-sequence, ranks but the first drop gathered rows of documents that they have no query of.

    Nothing comes out wrong before somebody takes the buffer for what it is meant to be, the same on every rank.
    """

    id = "R10"

    def store(self, metadata: MicroSequenceMetadata, k: torch.Tensor, v: torch.Tensor) -> None:
        super().store(metadata, k, v)
        assert isinstance(metadata, RankMetadata)
        if self.collectives.rank and metadata.shared_end == self.case.tokens:
            for buffer in (self.buffer.k, self.buffer.v):
                buffer[metadata.shared_begin : max(metadata.shared_begin, metadata.first_document_begin)] = 0


class SumsLeftEverywhere(_OtherReduction):
    """Reduced gradient rows are left on all ranks and not on their owner alone, where nobody asks for them again."""

    id = "R11"

    def reduce(self, metadata: RankMetadata) -> None:
        own = self.reduced(metadata)
        rows = self.buffer.gradient[metadata.shared_begin : metadata.shared_end]
        self.collectives.gather(own, rows).wait()


class _WrittenOnWait(Collectives):
    """Collectives that have nothing to show before they are waited for.

    A handle promises no more than that, and a transport that happens to be through already hides who did not wait. So
    this one lets the real collective finish in a staging area, on every rank alike, and copies its result on ``wait``.
    """

    def __init__(self, real: Collectives) -> None:
        super().__init__(real.rank, real.ranks)
        self._real = real

    def gather(self, own: torch.Tensor, whole: torch.Tensor) -> Handle:
        staged = torch.empty_like(whole, memory_format=torch.contiguous_format)
        self._real.gather(own, staged).wait()
        return _CopyOnWait(staged, whole)

    def reduce_scatter(self, whole: torch.Tensor, own: torch.Tensor) -> Handle:
        staged = torch.empty_like(own, memory_format=torch.contiguous_format)
        self._real.reduce_scatter(whole, staged).wait()
        return _CopyOnWait(staged, own)

    def block(self, size: int) -> Collectives:
        return _WrittenOnWait(self._real.block(size))


class _CopyOnWait(Handle):
    def __init__(self, staged: torch.Tensor, target: torch.Tensor) -> None:
        self._staged, self._target = staged, target

    def wait(self) -> None:
        self._target.copy_(self._staged)


class _Deferred(RankFault):
    """A layer over collectives that have nothing to show before they are waited for."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> None:
        super().__init__(weights, case, kernel, _WrittenOnWait(collectives))


class GatherNotAwaited(_Deferred):
    """Attention starts while values are still being gathered: their handle is not waited for.

    Deterministic: the gather finishes aside and is copied into the buffer when it is waited for, which nobody does, so
    that the attention always meets rows that nobody has written. A gloo gather would be through more often than not.
    """

    id = "R04-gather"
    reports = ("MagiAttention#55", "MagiAttention#22")

    def store(self, metadata: MicroSequenceMetadata, k: torch.Tensor, v: torch.Tensor) -> None:
        assert isinstance(metadata, RankMetadata)
        keys, values = self.buffer.claim(metadata.shared_begin, metadata.shared_end)
        self.collectives.gather(k, keys).wait()
        self.collectives.gather(v, values)


class ReductionNotAwaited(_Deferred):
    """The gradient slice is taken while it is still being reduced: the handle is not waited for.

    Deterministic in the same way as R04-gather: the slice's memory is unwritten until somebody waits.
    """

    id = "R04-reduce"
    reports = ("MagiAttention#55", "MagiAttention#22")

    def reduce(self, metadata: RankMetadata) -> None:
        gradient = self.buffer.gradient
        own = torch.empty_like(gradient[metadata.begin : metadata.end])
        self.collectives.reduce_scatter(gradient[metadata.shared_begin : metadata.shared_end], own)
        gradient[metadata.begin : metadata.end] = own


class ReducedToTheFirst(_OtherReduction):
    """A reduce stands where a reduce-scatter should: the first rank has the sum, the others their own share of it."""

    id = "R05"

    def reduce(self, metadata: RankMetadata) -> None:
        own = self.reduced(metadata)
        if self.collectives.rank == 0:
            self.buffer.gradient[metadata.begin : metadata.end] = own


class CountedTwice(_OtherReduction):
    """The sum over ranks is added to the rank's own share instead of replacing it: that share counts twice."""

    id = "R06"
    reports = ("TransformerEngine#1557", "TransformerEngine#1054")

    def reduce(self, metadata: RankMetadata) -> None:
        self.buffer.gradient[metadata.begin : metadata.end] += self.reduced(metadata)


class FirstRanksExtent(RankFault):
    """All ranks take the first rank's first_document_begin: where theirs is later, keys are rows off."""

    id = "R07"
    reports = ("the class of Fast-LLM#514", "fla#1115")

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: MicroSequenceMetadata
    ) -> torch.Tensor:
        assert isinstance(metadata, RankMetadata)
        begin, end, ranks = metadata.shared_begin, metadata.shared_end, self.collectives.ranks
        first = preprocess_rank(self.lengths, begin, end, 0, ranks, causal=self.case.causal, device=self.device)
        early = dataclasses.replace(metadata, first_document_begin=first.first_document_begin)
        return super().attend(q, k, v, early)


class LowPrecisionReduction(_OtherReduction):
    """Ranks' gradients are rounded to the storage dtype before they are added up, and so is their sum."""

    id = "R08"
    reports = ("ring-flash-attention#42", "Dao-AILab/flash-attention#2723")

    def reduce(self, metadata: RankMetadata) -> None:
        gradient, dtype = self.buffer.gradient, self.buffer.k.dtype
        own = torch.empty_like(gradient[metadata.begin : metadata.end], dtype=dtype)
        shared = gradient[metadata.shared_begin : metadata.shared_end].to(dtype)
        self.collectives.reduce_scatter(shared, own).wait()
        gradient[metadata.begin : metadata.end] = own.float()


class AveragedOverRanks(_OtherReduction):
    """The gradient is averaged over the ranks, as data-parallel gradients are, instead of summed."""

    id = "R09"
    reports = ("Megatron-LM#673", "SkyRL#1420")

    def reduce(self, metadata: RankMetadata) -> None:
        self.buffer.gradient[metadata.begin : metadata.end] = self.reduced(metadata) / self.collectives.ranks


class SharedStackOfRanks(RankFault):
    """Contexts of all sequences of a rank lie on one stack, and the backward takes the last one."""

    id = "R19"
    _stack: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []
    _owners: ClassVar[deque[RankFault]] = deque(maxlen=50)

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> None:
        super().__init__(weights, case, kernel, collectives)
        # What is never taken back would stay for good.
        del self._stack[:-1000]
        self._pending = self._stack
        # The backward of a layer that is gone would fail, and not be wrong.
        self._owners.append(self)
