"""Kernels without a backward: their forward is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_fuzz.adapters.call import OPTIONS, AdaptedKernel, Call, Function, taken


def forward_only(function: Function, *, capabilities: Mapping[str, Any] | None = None) -> AdaptedKernel:
    """A varlen kernel that has a forward only, such as one for inference.

        kernel = adapters.forward_only(prefill)

    The same as ``prefill.capabilities = {"backward": False}``, of what another adapter gives, too. Judged are ``out``,
    the LSE, and all that is asked of forward passes: inputs that change, unwritten memory, isolation, graphs, streams,
    merging. **Not judged** are gradients.

    Args:
        function: a varlen kernel, or what another adapter gives; its output may be without a graph.
        capabilities: what else is true of it, by fields of ``backends.kernel.Capabilities``.
    """

    def run(call: Call) -> Any:
        sums = (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
        return function(call.q, call.k, call.v, *sums, **call.options)

    declared = {**(capabilities or {}), "backward": False}
    return AdaptedKernel(function, run, list(taken(function, OPTIONS, None)), {}, declared)
