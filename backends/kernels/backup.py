"""Masked baddbmm: the fall-back attention that runs everywhere, with every intermediate in the storage dtype."""

from __future__ import annotations

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.sdpa import as_softmax_does
from attn_fuzz.reference.case import FAR_MEMORIES
from attn_fuzz.reference.profile import Profile


class Backup(Kernel):
    """Explicit mask over the whole packed sequence; scores are stored in the dtype, the softmax is float32."""

    name = "backup"
    paths = frozenset({"baddbmm"})
    capabilities = Capabilities(
        capacity=False,
        isolates_nonfinite=False,
        head_dims_v=True,
        far_memories=FAR_MEMORIES,
        graphs=None,
        traceable=None,
    )
    profile = Profile(
        scales_gradients=True,
        rounds_scores=True,
        rounds_dp=True,
        delta_from_output=False,
        delta_from_probabilities=True,
    )

    def profile_on(self, device: str) -> Profile:
        return as_softmax_does(self.profile, device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        tokens_q, heads, head_dim = q.shape
        kv_heads = k.shape[1]
        group = heads // kv_heads
        # [kv_heads, tokens_q * group, d]: the group's heads ride along as rows, so K/V need no expansion.
        grouped = q.unflatten(1, (kv_heads, group)).transpose(0, 1).reshape(kv_heads, tokens_q * group, head_dim)
        scores = torch.baddbmm(q.new_zeros(()), grouped, k.permute(1, 2, 0), beta=0, alpha=options.scale).view(
            kv_heads, tokens_q, group, len(k)
        )
        mask = metadata.allowed(options.effective_window)[:, None, :]
        weights = scores.float()
        if options.softcap:
            weights = options.softcap * torch.tanh(weights / options.softcap)
        # A finite mask value keeps rows without keys free of NaN; their uniform weights are then cleared.
        weights = torch.where(mask, weights, torch.finfo(torch.float32).min).softmax(-1)
        weights = torch.where(mask, weights, 0.0).to(q.dtype)
        out = torch.bmm(weights.flatten(1, 2), v.transpose(0, 1))
        placed = out.view(kv_heads, tokens_q, group, v.shape[2]).transpose(0, 1).flatten(1, 2)
        return Attended(placed, None, "baddbmm")


KERNEL = Backup()
