"""Faults of the K/V buffer and of what a layer keeps between calls."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import LayerFault
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.kv_buffer import KeyValueBuffer
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.reference.case import Case


class _Overwrites(KeyValueBuffer):
    def accumulate(self, begin: int, end: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        self.dk[begin:end] = dk.float()
        self.dv[begin:end] = dv.float()


class Overwritten(LayerFault, BufferedLayer):
    """dK and dV are stored over what later micro-sequences had added."""

    id, buffer_type = "M38-overwritten", _Overwrites
    reports = ("Fast-LLM#514", "#551", "TransformerEngine#1054")


class _NotZeroed(KeyValueBuffer):
    def __init__(
        self, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, memory: str
    ) -> None:
        super().__init__(rows, kv_heads, head_dim, dtype, device, memory)
        self.dk, self.dv = torch.empty_like(self.dk), torch.empty_like(self.dv)


class NotZeroed(LayerFault, BufferedLayer):
    """The gradient buffer is allocated and not zeroed."""

    id, buffer_type = "M38-unzeroed", _NotZeroed
    reports = ("Fast-LLM#551",)


class _CountsTwice(KeyValueBuffer):
    def accumulate(self, begin: int, end: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        super().accumulate(begin, end, dk, dv)
        if end < self.frontier:
            self.dv[end - 1] += dv[-1]


class CountedTwice(LayerFault, BufferedLayer):
    """The last row's dV is counted twice, but for the last micro-sequence."""

    id, buffer_type = "M38-twice", _CountsTwice
    reports = ("TransformerEngine#1557",)


class _LowPrecision(KeyValueBuffer):
    def accumulate(self, begin: int, end: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        dtype = self.k.dtype
        self.dk[begin:end] = (self.dk[begin:end].to(dtype) + dk).float()
        self.dv[begin:end] = (self.dv[begin:end].to(dtype) + dv).float()


class LowPrecisionSums(LayerFault, BufferedLayer):
    """Sums over micro-sequences are rounded to the storage dtype at every step."""

    id, buffer_type = "M40", _LowPrecision
    reports = ("ring-flash-attention#42", "Dao-AILab/flash-attention#2723")


class _WritesOneMore(KeyValueBuffer):
    def write(self, begin: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(begin, end, k, v)
        if end < len(self.k):
            self.k[end] = k[-1]


class AppendsOneMore(LayerFault, BufferedLayer):
    """A write into the buffer goes one row past its slice."""

    id, buffer_type = "M41-past", _WritesOneMore
    reports = ("Dao-AILab/flash-attention#638", "vllm#43810")


class _WritesFirst(KeyValueBuffer):
    def write(self, begin: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(begin, end, k, v)
        if begin and end - begin == 1:
            self.v[0] = self.v[0] + 0.0 * v[0] + 2.0**-20


class CacheSlotZero(LayerFault, BufferedLayer):
    """A single-token step writes slot 0 as well as its own."""

    id, buffer_type = "F6", _WritesFirst
    reports = ("Dao-AILab/flash-attention#772",)


class _ClearsDead(KeyValueBuffer):
    def accumulate(self, begin: int, end: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        super().accumulate(begin, end, dk, dv)
        self.dk[end:] = 0
        self.dv[end:] = 0


class ClearsLaterRows(LayerFault, BufferedLayer):
    """A backward zeroes gradient rows behind its extent, which later micro-sequences had filled."""

    id, buffer_type = "X20", _ClearsDead


class _TakesPast(KeyValueBuffer):
    def gradients(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        dk, dv = super().gradients(begin, end)
        return dk, torch.cat([dv[:-1], self.dv[begin : begin + 1].to(dv.dtype)])


class TakesWrongRow(LayerFault, BufferedLayer):
    """The last row of a micro-sequence is given the first row's dV."""

    id, buffer_type = "X21", _TakesPast


class SharedBuffer(LayerFault, BufferedLayer):
    """Buffers are pooled by shape: a second sequence overwrites keys that the first one's backward still needs."""

    id = "M37"
    reports = ("diffusers#14265", "transformers#28056")
    _pool: ClassVar[dict[tuple[object, ...], KeyValueBuffer]] = {}

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        key = (tuple(self.buffer.k.shape), self.buffer.k.dtype, case.memory)
        pooled = self._pool.setdefault(key, self.buffer)
        # Keys and values are shared, gradients are this sequence's own.
        self.buffer.k, self.buffer.v = pooled.k, pooled.v


class SharedStack(LayerFault, BufferedLayer):
    """Contexts of all sequences lie on one stack, and the backward takes the last one."""

    id = "X39"
    _stack: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []
    _owners: ClassVar[deque[BufferedLayer]] = deque(maxlen=50)

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        # What is never taken back would stay for good.
        del self._stack[:-1000]
        self._pending = self._stack
        # The backward of a layer that is gone would fail, and not be wrong.
        self._owners.append(self)
