"""Faults between calls: what goes wrong only now and then."""

from __future__ import annotations

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.loop import Call, Gradients


class NowAndThen(KernelFault):
    """Every 61st call loses its first row of dV, as a race does: the same case again is right."""

    id = "X36"
    reports = ("the class of Dao-AILab/flash-attention#2756", "the class of Dao-AILab/flash-attention#2229")
    levels = ("kernel",)

    def __init__(self) -> None:
        self._calls = 0

    def handed_back(self, call: Call, gradients: Gradients) -> Gradients:
        dq, dk, dv = gradients
        self._calls += 1
        if self._calls % 61 == 0:
            dv[:1] = 0
        return dq, dk, dv
