"""torch's scaled_dot_product_attention over the whole packed sequence with an explicit bottom-right mask."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.sdpa import CPU_EXP_ERROR, MOST_MASKED, as_flash_does
from attn_fuzz.reference.profile import Profile


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
) -> torch.Tensor:
    """SDPA with a mask; K/V are expanded to the query heads, since torch's fused kernels need equal heads."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=metadata.allowed(options.effective_window)[None, None],
        scale=options.scale,
    )
    return out[0].transpose(0, 1)


class SdpaDense(Kernel):
    """The kernel that torch's dispatcher picks for an explicit mask."""

    name = "sdpa_dense"
    paths = frozenset({"dense"})
    capabilities = Capabilities(
        softcap=False,
        capacity=False,
        isolates_nonfinite=False,
        queries_without_keys=False,
        # The fused kernels of CUDA fault on base pointers off 16-byte alignment, and add up dQ in no fixed order.
        memories=ALIGNED_MEMORIES,
        repeatable_backward=False,
        graphs=None,
        traceable=None,
    )
    # The memory-efficient backward of CUDA forms dS from P as its tiles keep it, in the storage dtype.
    profile = Profile(stores_probabilities=True, expands_kv=True, exp_error=CPU_EXP_ERROR)

    call_source = """def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    q0 = k0 = 0
    for nq, nk in zip(LENGTHS_Q, LENGTHS_K):
        distance = torch.arange(nq)[:, None] + (nk - nq) - torch.arange(nk)[None, :]
        seen = (distance <= WINDOW[0]) if WINDOW[0] >= 0 else torch.ones_like(distance, dtype=torch.bool)
        if CAUSAL or WINDOW[1] >= 0:
            seen &= distance >= -(0 if CAUSAL else WINDOW[1])
        mask[q0 : q0 + nq, k0 : k0 + nk] = seen
        q0, k0 = q0 + nq, k0 + nk
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask.to(DEVICE)[None, None], scale=SCALE
    )
    return out[0].transpose(0, 1)"""

    def capabilities_on(self, device: str) -> Capabilities:
        # On CPU values of another head_dim would go to the unfused composition, which rounds elsewhere.
        # Of CUDA's kernels the memory-efficient one may be picked.
        cuda = device == "cuda"
        if not cuda:
            return self.capabilities
        # On Hopper it is cuDNN's that is picked for half precision, which is planned for every shape.
        return dataclasses.replace(
            self.capabilities, head_dims_v=True, most_scores=MOST_MASKED, compiles=True, layouts=12
        )

    def profile_on(self, device: str) -> Profile:
        return as_flash_does(self.profile, device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        return Attended(dense_attention(q, k, v, metadata, options), None, "dense")


KERNEL = SdpaDense()
