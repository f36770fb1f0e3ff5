"""Kernels without a backward: their forward is judged, and gradients come from the loop, so that all else runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_fuzz.backends import loop
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VarlenMetadata, AttentionOptions], Attended]


def forward_only(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    metadata: VarlenMetadata,
    options: AttentionOptions,
) -> Attended:
    """What a forward gives, run without autograd, with gradients that it has nothing to do with.

    ``dq``, ``dk`` and ``dv`` are the loop's, right whatever the forward did: nothing is said of them. An LSE is marked
    not differentiable.

    Args:
        attend: the forward; its output may be without a graph.
        q: ``[tokens_q, heads, head_dim]``.
        k: ``[tokens_k, kv_heads, head_dim]``.
        v: ``[tokens_k, kv_heads, value_dim]``.
        metadata: where the documents lie.
        options: scale, masks, softcap.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return attend(q, k, v, metadata, options)
    paths: list[str] = []

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended = attend(q, k, v, metadata, options)
        paths.append(attended.path)
        return attended.out, attended.lse

    out, lse = _ForwardOnly.apply(forward, metadata, options, q, k, v)
    return Attended(out, lse, paths[0])


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, metadata: VarlenMetadata, options: AttentionOptions, *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.call = metadata, options
        out, lse = forward(*(x.detach() for x in tensors))
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        metadata, options = ctx.call
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out, _ = loop.attend(_Filled(), q, k, v, metadata, options)
        return None, None, None, *torch.autograd.grad(out, (q, k, v), gradients[0])


class _Filled(loop.Loop):
    """Zeros in rows that are no document's, whatever is promised of those."""

    def allocate(self, like: torch.Tensor, name: str) -> torch.Tensor:
        return torch.zeros_like(like)
