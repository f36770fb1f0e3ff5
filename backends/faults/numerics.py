"""Softmax, softcap, LSE: numbers that are wrong for some inputs only, or by little."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call, Document


class EmptyDocumentsUnwritten(KernelFault):
    """Documents without keys are skipped, and their output rows never written."""

    id = "M11-out"
    reports = ("Dao-AILab/flash-attention#2470", "#1778")

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "out" and value.numel() and not value.any():
            return
        super().write(result, rows, value, name)


class NoQueriesUnwritten(KernelFault):
    """Documents without queries are skipped, and their dK and dV never written."""

    id = "M11-dkv"
    reports = ("Dao-AILab/flash-attention#2568",)

    def documents(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backward: bool
    ) -> list[Document]:
        return [document for document in super().documents(call, q, k, v, backward=backward) if document.queries]


class _LseOfEmptyRows(KernelFault):
    value: ClassVar[float]

    def write_lse(self, lse: torch.Tensor, document: Document, value: torch.Tensor) -> None:
        super().write_lse(lse, document, torch.where(value == -torch.inf, self.value, value))


class LseOfEmptyRowsInfinite(_LseOfEmptyRows):
    """Rows without keys have an LSE of +inf, which nothing declares."""

    id, value = "M14-inf", math.inf
    reports = ("Dao-AILab/flash-attention#978", "vllm#15492")


class LseOfEmptyRowsZero(_LseOfEmptyRows):
    """Rows without keys have an LSE of 0."""

    id, value = "M14-zero", 0.0
    reports = ("vllm#49294",)


class LseOfEmptyRowsFinite(_LseOfEmptyRows):
    """Rows without keys have the LSE of a finite mask value."""

    id, value = "M14-finite", -49994.0
    reports = ("flashinfer#4452",)


class MergeWithoutGuard(KernelFault):
    """Two halves of the keys are merged by their LSE, without a guard for halves that a row does not see."""

    id = "M15"
    reports = ("vllm#27491", "#39148", "flashinfer#4051")

    def softmax(self, call: Call, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = masked.shape[-1] // 2
        if not half:
            return super().softmax(call, masked)
        parts = [_half_softmax(part) for part in (masked[..., :half], masked[..., half:])]
        top = torch.maximum(parts[0][1], parts[1][1])
        weights = [torch.exp(lse - top) for _, lse in parts]
        total = weights[0] + weights[1]
        merged = [p * (w / total)[..., None] for (p, _), w in zip(parts, weights, strict=True)]
        return torch.cat(merged, -1), top + total.log()


def _half_softmax(masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and LSE of one half; -inf rows give 0 and -inf."""
    lse = torch.logsumexp(masked, -1)
    return torch.exp(masked - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), lse


class FiniteMask(KernelFault):
    """Masked scores are -5e4 instead of -inf."""

    id = "M16"
    reports = ("flashinfer#4267", "pytorch#109517")

    def masked(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~mask, -5e4)


class RowMaxFromZero(KernelFault):
    """The running row maximum starts at 0: rows whose scores are all far below it underflow."""

    id = "B9"
    reports = ("Dao-AILab/flash-attention#2082",)

    def softmax(self, call: Call, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if masked.shape[-1] == 0:
            return super().softmax(call, masked)
        top = masked.amax(-1, keepdim=True).clamp_min(0.0)
        weights = torch.exp(masked - top)
        total = weights.sum(-1, keepdim=True)
        lse = (top + total.log())[..., 0]
        return weights / total.clamp_min(1e-38), lse


class NoRowMax(KernelFault):
    """The softmax does not subtract the row maximum: large scores overflow."""

    id = "X06"

    def softmax(self, call: Call, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.exp(masked)
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total == 0, 1.0, total), total.log()[..., 0]


class SharedRowMax(KernelFault):
    """One maximum for all documents of a call, kept from the first: the rest underflow beside a large one."""

    id = "X07"

    def __init__(self) -> None:
        self._top = -math.inf

    def softmax(self, call: Call, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if masked.shape[-1] == 0:
            return super().softmax(call, masked)
        finite = masked[masked > -torch.inf]
        self._top = max(self._top, finite.max().item()) if finite.numel() else self._top
        top = min(self._top, 1e30)
        weights = torch.exp(masked - top)
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total == 0, 1.0, total), top + total.log()[..., 0]

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._top = -math.inf
        return super().forward(call, q, k, v)


class LseBaseTwo(KernelFault):
    """The LSE handed out is in base 2."""

    id = "M44"
    reports = ("attention-gym#200", "flashinfer#4015")

    def write_lse(self, lse: torch.Tensor, document: Document, value: torch.Tensor) -> None:
        super().write_lse(lse, document, value / math.log(2))

    def saved_lse(self, call: Call, lse: torch.Tensor, document: Document) -> torch.Tensor:
        return super().saved_lse(call, lse, document) * math.log(2)


class SoftcapFormula(KernelFault):
    """Softcap multiplies the score with the tanh: s * tanh(s / cap)."""

    id = "M46-forward"
    reports = ("Dao-AILab/flash-attention#2402",)

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        capped, slope = super().scores(call, document)
        if cap := call.options.softcap:
            capped = torch.atanh((capped / cap).clamp(-1 + 1e-7, 1 - 1e-7)) * capped
        return capped, slope


class SoftcapBackward(KernelFault):
    """The backward forgets the derivative of softcap."""

    id = "M46-backward"
    reports = ("Dao-AILab/flash-attention#2396",)

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        capped, slope = super().scores(call, document)
        return capped, torch.ones_like(slope)


class RunToRun(KernelFault):
    """Gradients differ from run to run by a last bit, though the same bits are promised."""

    id = "X08"
    reports = ("Dao-AILab/flash-attention#2244", "#746")
    capabilities = Capabilities(covers_all_rows=False, repeatable=True)

    def __init__(self) -> None:
        self._calls = 0

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "dq":
            self._calls += 1
            value = value * (1 + 2.0**-8 * (self._calls % 3 == 0))
        super().write(result, rows, value, name)


class DoubleRounding(KernelFault):
    """Output is rounded to three bits less than its dtype has."""

    id = "X09"
    levels = ("kernel",)
    capabilities = Capabilities(covers_all_rows=False, dtypes=("bf16", "fp16"))

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "out":
            unit = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}[result.dtype]
            mantissa, exponent = torch.frexp(value)
            value = torch.ldexp((mantissa / unit).round() * unit, exponent)
        super().write(result, rows, value, name)


class ScaleRoundedBackward(KernelFault):
    """The backward's scale is off by 1 % for wide heads: every channel of dQ moves, none of them far."""

    id = "X27"
    levels = ("kernel",)
    capabilities = Capabilities(covers_all_rows=False, dtypes=("bf16",))

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        wide = name == "dq" and value.shape[-1] >= 64
        super().write(result, rows, value * (1 + 1.25 * 2.0**-7) if wide else value, name)


def _added_up(weights: torch.Tensor, values: torch.Tensor, tile: int, dtype: torch.dtype) -> torch.Tensor:
    """``weights @ values`` over tiles of keys, the running sum stored in a dtype."""
    total = torch.zeros_like(weights[..., :0] @ values[:, :0])
    for part, rows in zip(weights.split(tile, -1), values.split(tile, 1), strict=True):
        total = (total + part @ rows).to(dtype).float()
    return total


class OutputSwamped(KernelFault):
    """The output is added up over tiles of 32 keys in the storage dtype."""

    id = "X37"
    levels = ("kernel",)
    capabilities = Capabilities(covers_all_rows=False, dtypes=("bf16", "fp16"))

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _added_up(probabilities.to(call.dtype).float(), document.v, 32, call.dtype)


class QueryGradientSwamped(KernelFault):
    """dQ is added up over tiles of 12 keys in the storage dtype."""

    id = "X38"
    levels = ("kernel",)
    capabilities = Capabilities(covers_all_rows=False, dtypes=("bf16", "fp16"))

    def dq(self, call: Call, document: Document, ds: torch.Tensor) -> torch.Tensor:
        return call.options.scale * _added_up(ds, document.k, 12, call.dtype)


class PositionDependent(KernelFault):
    """Documents at an odd place in the pack are scaled by 1 + 2^-5."""

    id = "X10"

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        value = super().weighted(call, document, probabilities, v)
        return value * (1 + 2.0**-5) if document.index % 2 else value


class FallsBack(KernelFault):
    """Grouped heads silently take another implementation."""

    id = "X11"
    path = "loop"

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.path = "loop" if call.group == 1 else "math"
        return super().forward(call, q, k, v)
