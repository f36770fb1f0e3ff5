"""The buffered layer over many micro-sequences, and what it keeps from one to the next."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.faults.fault import LayerFault
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.backends.rotary import Rotary
from attn_fuzz.reference.case import Case


class SixthForgets(LayerFault, BufferedLayer):
    """From the sixth micro-sequence on, a straddling document's past is no longer attended to."""

    id = "L01"

    def preprocess(self, begin: int, end: int) -> MicroSequenceMetadata:
        made = super().preprocess(begin, end)
        if len(self._pending) < 5 or made.first_document_begin == begin:
            return made
        first = made.varlen.lengths_q[0]
        varlen = dataclasses.replace(made.varlen, lengths_k=(first, *made.varlen.lengths_k[1:]))
        return dataclasses.replace(made, first_document_begin=begin, varlen=varlen)


class LowPrecisionWeightSums(LayerFault, BufferedLayer):
    """Weight gradients are handed over in float32, but were rounded to the storage dtype at every micro-sequence."""

    id = "L02"

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        for gradient in self.gradients.values():
            gradient.copy_(gradient.to(dout.dtype))
        return dx


class RotaryBaseFixed(LayerFault, BufferedLayer):
    """The base of the rotary frequencies is written into the code."""

    id = "L03"

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        self.rotary = Rotary(case.replace(rotary_theta=10000.0), max(self.lengths), self.device)


class RotaryHalf(LayerFault, BufferedLayer):
    """A proportional rotary turns half of the channel pairs, whatever share it was asked for."""

    id = "L04"

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        self.rotary = Rotary(case.replace(rotary_fraction=0.5), max(self.lengths), self.device)


class OutputWorkspace(LayerFault, BufferedLayer):
    """Outputs are views of one workspace, which the next micro-sequence writes over."""

    id = "L05"

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        workspace: torch.Tensor = self.__dict__.setdefault("_workspace", out.new_zeros(self.case.tokens, out.shape[1]))
        workspace[: len(out)] = out
        return workspace[: len(out)]


class GrowthLosesRow(LayerFault, BufferedLayer):
    """A buffer that grows by doubling leaves the last row behind."""

    id = "L06"

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        self._room = 4

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        if begin and end > self._room >= begin:
            # As after a reallocation: the copy stops one row short of what had been written.
            self.buffer.v = self.buffer.v.clone()
            self.buffer.v[begin - 1] = 0
        while self._room < end:
            self._room *= 2
        return super().forward(x, begin, end)


class QuerySumRounded(LayerFault, BufferedLayer):
    """Of all sums over micro-sequences, the query projection's gradient alone is rounded to the storage dtype."""

    id = "M40-query"
    reports = ("the class of Dao-AILab/flash-attention#2723",)

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        total = self.gradients["query"]
        total.copy_(total.to(dout.dtype))
        return dx
