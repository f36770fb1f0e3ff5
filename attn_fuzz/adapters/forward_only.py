"""Kernels without a backward: their forward is judged, gradients come from the harness's own reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attn_fuzz.adapters.call import OPTIONS, AdaptedKernel, Call, Function, taken
from attn_fuzz.reference import attention


def forward_only(function: Function, *, capabilities: Mapping[str, Any] | None = None) -> AdaptedKernel:
    """A varlen kernel that has a forward only, such as one for inference.

        kernel = adapters.forward_only(prefill)

    Judged are ``out``, the LSE where it is declared, and all that is asked of forward passes: inputs that change,
    unwritten memory, isolation. **Not judged** are gradients: ``dq``, ``dk`` and ``dv`` are those of the reference in
    float64, which are right whatever the kernel does, so that a clean verdict says nothing about a backward.

    Args:
        function: a varlen kernel, or what another adapter gives; its output may be without a graph.
        capabilities: what else is true of it, by fields of ``backends.kernel.Capabilities``.
    """

    def run(call: Call) -> Any:
        return _ForwardOnly.apply(function, call, call.q, call.k, call.v)

    return AdaptedKernel(function, run, list(taken(function, OPTIONS, None)), {}, capabilities)


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.call = call
        sums = (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
        returned = function(q, k, v, *sums, **call.options)
        if isinstance(returned, tuple):
            ctx.mark_non_differentiable(*(x for x in returned[1:] if isinstance(x, torch.Tensor)))
        return returned

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return None, None, *gradients(ctx.call, q, k, v, dout)


def gradients(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of a call by the reference, in the dtypes of ``q``, ``k`` and ``v``; zeros outside documents."""
    found = [x.new_zeros(x.shape) for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    given = call.options.get("softmax_scale")
    scale, softcap = q.shape[2] ** -0.5 if given is None else given, call.options.get("softcap", 0.0)
    for document in call.documents:
        rows, keys = document
        qd, kd, vd, doutd = (
            x[place].double().transpose(0, 1) for x, place in zip((q, k, v, dout), (rows, keys, keys, rows))
        )
        kd, vd = attention.expand_heads(kd, group), attention.expand_heads(vd, group)
        mask = attention.allowed_keys(document.queries, document.seen, call.window, q.device)
        result = attention.forward(qd, kd, vd, mask, scale, softcap)
        dq, dk, dv = attention.backward(qd, kd, vd, doutd, scale, result)
        sums = (dq, attention.sum_groups(dk, group), attention.sum_groups(dv, group))
        for gradient, place, value in zip(found, (rows, keys, keys), sums, strict=True):
            gradient[place] = value.transpose(0, 1).to(gradient.dtype)
    dq, dk, dv = found
    return dq, dk, dv
