"""Backward passes and grouped heads: the forward is right, or right for the first head."""

from __future__ import annotations

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.loop import Call, Document, Gradients


class HeadMapBackward(KernelFault):
    """The backward maps query head h to K/V head h % kv_heads."""

    id = "M27"
    reports = ("NSA-triton#27",)

    def expand(self, call: Call, x: torch.Tensor, backward: bool) -> torch.Tensor:
        return x.repeat(call.group, 1, 1) if backward else super().expand(call, x, backward)


class HeadMap(KernelFault):
    """Query head h reads K/V head h % kv_heads."""

    id = "X12"

    def expand(self, call: Call, x: torch.Tensor, backward: bool) -> torch.Tensor:
        return x.repeat(call.group, 1, 1)

    def reduce(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (call.group, -1)).sum(0)


class LastHeadWins(KernelFault):
    """dK and dV of a group are those of its last head."""

    id = "M28-last"
    reports = ("levanter#449",)

    def reduce(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, call.group))[:, -1]


class GroupMean(KernelFault):
    """dK and dV of a group are averaged instead of summed."""

    id = "M28-mean"
    reports = ("fla#384",)

    def reduce(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        return super().reduce(call, x) / call.group


class FirstHeadLse(KernelFault):
    """The LSE is written for the first head of a group only."""

    id = "M29"
    reports = ("cudnn-frontend#1083",)

    def write_lse(self, lse: torch.Tensor, document: Document, value: torch.Tensor) -> None:
        group = len(document.q) // max(1, self._kv_heads)
        lse[::group, document.rows] = value[::group]

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._kv_heads = k.shape[1]
        return super().forward(call, q, k, v)


class ValueTruncated(KernelFault):
    """dP leaves out the last channel of odd and wide heads."""

    id = "M30"
    reports = ("NSA-triton#27", "Dao-AILab/flash-attention#2552")

    def dp(self, call: Call, document: Document, dout: torch.Tensor) -> torch.Tensor:
        width = dout.shape[-1]
        kept = width // 2 * 2 if width < 96 else 64
        return dout[..., :kept] @ document.v[..., :kept].transpose(-1, -2)


class KeyForValue(KernelFault):
    """dP is formed from K."""

    id = "M34"
    reports = ("diffusers#14338",)

    def dp(self, call: Call, document: Document, dout: torch.Tensor) -> torch.Tensor:
        return dout @ document.k.transpose(-1, -2)


class SwappedGradients(KernelFault):
    """dK and dV are returned in each other's place."""

    id = "M51-swapped"
    reports = ("long-context-attention#149", "pytorch#170142")

    def handed_back(self, call: Call, gradients: Gradients) -> Gradients:
        dq, dk, dv = gradients
        return dq, dv, dk


class DetachedDenominator(KernelFault):
    """dK leaves out the softmax's denominator."""

    id = "M51-detached"
    reports = ("fla#875",)

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(super().delta(call, document, out, dout))


class DeltaWithoutLastChannel(KernelFault):
    """Row sums of dO O leave out the last channel of every head."""

    id = "X13"

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        product = dout * self.read(call, out, document.rows, "out")
        return product[..., :-1].sum(-1, keepdim=True)


class ScaleTwice(KernelFault):
    """dK is scaled twice where the scale is not the usual one."""

    id = "X14"

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "dk" and abs(self._scale * value.shape[-1] ** 0.5 - 1) > 1e-6:
            value = value * self._scale
        super().write(result, rows, value, name)

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        self._scale = call.options.scale
        return super().scores(call, document)


class LastRowWritesAgain(KernelFault):
    """A padding slot of -1 adds to the last row of dK."""

    id = "J5"
    reports = ("vllm#43810", "#43869")

    def handed_back(self, call: Call, gradients: Gradients) -> Gradients:
        dq, dk, dv = gradients
        if 0 in call.metadata.lengths_q:
            dk[sum(call.metadata.lengths_k) - 1] += 1.0
        return dq, dk, dv
