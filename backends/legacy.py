"""The known-bad layer: concatenated past, hand-attached gradients, and prefix sums that do not start at 0.

Its ``cu_seqlens_k[0]`` is ``first_document_begin``. Every forward output is right. In the backward, kernels leave the
rows of dK and dV before ``cu_seqlens_k[0]`` unwritten, and what the allocator had there is added to the gradients of
earlier documents (ServiceNow/Fast-LLM#514). It is the control that the harness must convict.
"""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.backends.output import require_output
from attn_fuzz.reference.case import Case


class AttachGrad(torch.autograd.Function):
    """Adds what a detached copy's gradient has become, and records the sum."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, copy: torch.Tensor, record: torch.Tensor
    ) -> torch.Tensor:
        ctx.copy, ctx.record = copy, record  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.copy.grad is not None:  # type: ignore[attr-defined]
            gradient = gradient + ctx.copy.grad  # type: ignore[attr-defined]
        ctx.record[: len(gradient)] = gradient  # type: ignore[attr-defined]
        return gradient, None, None


class LegacyLayer(BufferedLayer):
    """Presents are detached leaves; each micro-sequence concatenates the last one with its own K/V."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        self._present: torch.Tensor | None = None
        self._record = torch.zeros(
            case.tokens + case.capacity, 2 * case.kv_heads, case.head_dim, dtype=torch.float32, device=self.device
        )

    def preprocess(self, begin: int, end: int) -> MicroSequenceMetadata:
        metadata = super().preprocess(begin, end)
        shifted = dataclasses.replace(metadata.varlen, first_key_row=metadata.first_document_begin)
        # Positions come from the canonical metadata; only the kernel sees the shifted prefix sums.
        return dataclasses.replace(metadata, varlen=shifted)

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        metadata = self.preprocess(begin, end)
        positions = super().preprocess(begin, end).position_index
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            q, k, v = self.query_key_value(leaf, positions)
            key_value = torch.cat([k, v], 1)
            if self._present is not None:
                key_value = torch.cat([self._present, key_value], 0)
            self._present = key_value.detach().requires_grad_()
            key_value = AttachGrad.apply(key_value, self._present, self._record)
            keys, values = key_value.chunk(2, 1)
            attended = self.kernel.attend(q, keys, values, metadata.varlen, self.options)
            require_output(attended.out, q, values)
            self.ran.add(attended.path)
            out = self.project(attended.out.flatten(1), "dense")
        self._pending.append((leaf, out))
        return out.detach()

    def key_value(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def key_value_gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        k, v = self._record.chunk(2, 1)
        return k, v
