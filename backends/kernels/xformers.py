"""xformers' memory-efficient attention with block-diagonal masks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from backends.flash2 import ALIGNED_MEMORIES, flash2_limit
from backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from backends.metadata import VarlenMetadata
from reference.case import Case
from reference.profile import Profile


class Xformers(Kernel):
    """``xformers.ops.memory_efficient_attention`` over one packed batch element; it picks its kernel itself."""

    name = "xformers"
    paths = frozenset({"xformers.ops"})
    capabilities = Capabilities(
        devices=("cuda",),
        max_head_dim=256,
        head_dim_multiple=8,
        window_needs_causal=True,
        window_convention="keys to the left, the row itself counted; causal only",
        softcap=False,
        queries_without_keys=False,
        memories=ALIGNED_MEMORIES,
        capacity=False,
        repeatable_backward=False,
        covers_all_rows=False,
    )
    # The CUTLASS backward forms dS from P as its tiles keep it, in the storage dtype; groups are expanded by autograd.
    profile = Profile(stores_probabilities=True, expands_kv=True)

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        if case.dtype == "fp32" and case.window[0] >= 0:
            # Only its FlashAttention has a backward for local masks.
            return "a sliding window in fp32"
        return flash2_limit(case, calls)

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        if importlib.util.find_spec("xformers") is None:
            return "the package xformers is not installed"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        # The file is named as the package, which absolute imports do not mind.
        from xformers import ops

        biases: Any = ops.fmha.attn_bias
        kind = biases.BlockDiagonalCausalFromBottomRightMask if options.causal else biases.BlockDiagonalMask
        bias = kind.from_seqlens(list(metadata.lengths_q), list(metadata.lengths_k), device=q.device)
        if options.window[0] >= 0:
            bias = bias.make_local_attention_from_bottomright(options.window[0] + 1)
        kv_heads = k.shape[1]
        if (group := q.shape[1] // kv_heads) > 1:
            # Grouped heads are a dimension of their own, over which K/V are the same memory.
            q = q.unflatten(1, (kv_heads, group))
            k, v = (x[:, :, None].expand(-1, -1, group, -1) for x in (k, v))
        out = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=options.scale)[0]
        return Attended(out.flatten(1, 2) if group > 1 else out, None, "xformers.ops")


KERNEL = Xformers()
