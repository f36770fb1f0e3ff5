"""Faults between calls: what goes wrong only now and then."""

from __future__ import annotations

import torch

from backends.faults.fault import KernelFault
from backends.loop import Call


class NowAndThen(KernelFault):
    """Every 61st call loses its first row of dV, as a race does: the same case again is right."""

    id = "X36"
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
