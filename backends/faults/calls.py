"""Faults between calls: what is kept under the wrong key, and what goes wrong only now and then."""

from __future__ import annotations

from collections import OrderedDict

import torch

from backends.faults.fault import KernelFault
from backends.loop import Call

_KEPT = 2


class LengthsByAddress(KernelFault):
    """Prefix sums read back once are kept by the address of their tensor, and found again by whoever has it next."""

    id = "X36"
    reports = ("the class of Dao-AILab/flash-attention#1192", "the class of lmdeploy#4569")
    levels = ("kernel",)

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int, int], list[tuple[int, int]]] = OrderedDict()

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        sums = call.metadata.cu_seqlens_q if side == "q" else call.metadata.cu_seqlens_k
        lengths = call.metadata.lengths_q if side == "q" else call.metadata.lengths_k
        key = (sums.data_ptr(), len(sums), sum(lengths))
        if key not in self._kept:
            self._kept[key] = super().bounds(call, side, backward=backward)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]


class NowAndThen(KernelFault):
    """Every 61st call loses its first row of dV, as a race does: the same case again is right."""

    id = "X37"
    reports = ("the class of Dao-AILab/flash-attention#2756", "the class of Dao-AILab/flash-attention#2229")
    levels = ("kernel",)

    def __init__(self) -> None:
        self._calls = 0

    def backward(
        self,
        call: Call,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = super().backward(call, q, k, v, out, lse, dout)
        self._calls += 1
        if self._calls % 61 == 0:
            dv[:1] = 0
        return dq, dk, dv
