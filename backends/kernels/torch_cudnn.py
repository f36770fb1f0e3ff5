"""cuDNN attention through torch's operator, with prefix sums. It plans for every shape."""

from __future__ import annotations

from typing import Any, Final

import torch

from attn_fuzz.backends.flash2 import ALIKE_MEMORIES
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Configuration, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata

CONFIGURATIONS: Final = (
    Configuration("bf16", 64, 2, 2, True),
    Configuration("bf16", 64, 2, 2, False),
    Configuration("fp16", 128, 1, 1, True),
    Configuration("bf16", 128, 2, 2, True, head_dim_v=64),
    Configuration("fp16", 64, 2, 2, False, head_dim_v=128),
)

VALUE_DIMS: Final = ((128, 64), (64, 128))
"""(head_dim, head_dim_v) of those."""


class _Attention(torch.autograd.Function):
    """torch knows no derivative of the operator with prefix sums, so its backward is called by hand."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: tuple[Any, ...], causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, *sums, True, 0.0, causal, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.options = sums, causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        sums, causal, scale = ctx.options
        # No bias: an undefined tensor is what the operator asks for, and None is how Python says that.
        dq, dk, dv = torch.ops.aten._cudnn_attention_backward(
            gradients[0].contiguous(), q, k, v, out, lse, seed, offset, None, *sums, 0.0, causal, scale=scale
        )
        return dq, dk, dv, None, None, None


class TorchCudnn(Kernel):
    """``torch.ops.aten._cudnn_attention_forward`` and ``_backward``; its causal mask is top-left."""

    name = "torch_cudnn"
    paths = frozenset({"aten._cudnn_attention_forward"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        head_dims=(64, 128),
        head_dims_v=VALUE_DIMS,
        # Grouped heads leave gradients of a single token unwritten.
        gqa=False,
        causal_needs_equal_lengths=True,
        window=False,
        softcap=False,
        scale=False,
        queries_without_keys=False,
        memories=ALIKE_MEMORIES,
        repeatable_backward=False,
        covers_all_rows=False,
        graphs=None,
        configurations=CONFIGURATIONS,
        layouts=8,
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        m = metadata
        sums = m.cu_seqlens_q, m.cu_seqlens_k, m.max_seqlen_q, m.max_seqlen_k
        out, lse = _Attention.apply(q, k, v, sums, options.causal, options.scale)
        return Attended(out, lse.squeeze(-1).T, "aten._cudnn_attention_forward")


KERNEL = TorchCudnn()
