"""Faults that most checks are blind to: each is here because one check alone sees it."""

from __future__ import annotations

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call, Document, Gradients


class OneRowBackward(KernelFault):
    """The backward drops key 5 of query row 20: nothing where that key weighs little, and too little in long rows."""

    id = "X28"
    levels = ("kernel",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        mask = super().mask(call, document)
        if document.backward and document.queries > 20 and document.seen > 5:
            mask[20, 5] = False
        return mask


class GuardedScratch(KernelFault):
    """A scratch value that nobody wrote scales the output by up to 1 + 2^-9; a guard against NaN hides it."""

    id = "X29"
    reports = ("the class of vllm#49294",)
    capabilities = Capabilities(covers_all_rows=False, dtypes=("bf16",))

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Of a few KiB, as scratch space is: some C libraries keep smaller blocks of a process as they were freed.
        scratch = torch.empty(512, dtype=torch.float32, device=v.device)[:1]
        factor = 1 + 2.0**-9 * torch.nan_to_num(scratch, nan=0.0).tanh()
        return super().weighted(call, document, probabilities, v) * factor


class RefusesTooLate(KernelFault):
    """Softcap is refused, but only after the queries have been multiplied by the scale in place."""

    id = "X30"

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if call.options.softcap:
            q.mul_(call.options.scale)
            raise NotImplementedError("softcap is not supported")
        return super().forward(call, q, k, v)


class LseTransposed(KernelFault):
    """The LSE comes out token-major where head-major is promised."""

    id = "X31"
    levels = ("kernel",)

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(call, q, k, v)
        return out, lse.T.contiguous()

    def saved_lse(self, call: Call, lse: torch.Tensor, document: Document) -> torch.Tensor:
        return super().saved_lse(call, lse.T, document)


class PlanOfTheLast(KernelFault):
    """The plan depends on the shape of the call before: the same call gives other last bits after another shape."""

    id = "X32"
    reports = ("the class of flashinfer#4270",)
    capabilities = Capabilities(covers_all_rows=False, dtypes=("bf16",))

    def __init__(self) -> None:
        self._last, self._same = (0, 0), True

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._same, self._last = self._last == tuple(q.shape[:2]), (q.shape[0], q.shape[1])
        return super().forward(call, q, k, v)

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        value = super().weighted(call, document, probabilities, v)
        return value if self._same else value * (1 + 2.0**-9)


class InferenceTopLeft(KernelFault):
    """The inference path aligns causal attention top-left; training is right."""

    id = "X33"
    reports = ("the class of SageAttention#372", "the class of pytorch#108108")
    levels = ("kernel",)

    def shift(self, call: Call, document: Document) -> int:
        return super().shift(call, document) if call.training else 0


class DeltaOnlyWithValues(KernelFault):
    """rowsum(dO O) is computed beside dV, and left out where V needs no gradient."""

    id = "X34"
    reports = ("the class of pytorch#148476",)
    levels = ("kernel",)

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        delta = super().delta(call, document, out, dout)
        return delta if call.wanted[2] else torch.zeros_like(delta)


class ScratchOfTheGraph(KernelFault):
    """dQ is summed up in scratch that belongs to the graph and is cleared by the forward only."""

    id = "X35"
    levels = ("kernel",)

    def handed_back(self, call: Call, gradients: Gradients) -> Gradients:
        dq, dk, dv = gradients
        if "scratch" in call.kept:
            dq = dq + call.kept["scratch"]
        call.kept["scratch"] = dq
        return dq, dk, dv
