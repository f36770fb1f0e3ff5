"""torch's scaled_dot_product_attention on jagged tensors: documents as batch elements, no mask."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.kernels.sdpa_dense import dense_attention
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.sdpa import CPU_EXP_ERROR, as_flash_does
from attn_fuzz.reference.profile import Profile


def _jagged(x: torch.Tensor, cu_seqlens: torch.Tensor, shortest: int, longest: int) -> torch.Tensor:
    """``[tokens, heads, d]`` to jagged ``[documents, heads, *, d]``; given lengths spare a host sync."""
    # Jagged tensors take int64 offsets only, and their fused kernels contiguous values only.
    x = x.contiguous()
    if x.untyped_storage().nbytes() != x.nbytes:
        # On CPU jagged values are read from the start of their storage, without their offset (seen in torch 2.13).
        x = x.clone()
    jagged = torch.nested.nested_tensor_from_jagged(x, cu_seqlens.long(), min_seqlen=shortest, max_seqlen=longest)
    return jagged.transpose(1, 2)


UNFUSED = Profile(
    scales_inputs=True,
    scales_gradients=True,
    rounds_scores=True,
    rounds_dp=True,
    delta_from_probabilities=True,
    stores_probabilities=True,
    expands_kv=True,
    exp_error=CPU_EXP_ERROR,
)


def nested_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    metadata: VarlenMetadata,
    options: AttentionOptions,
    *,
    fused: bool,
) -> torch.Tensor:
    """SDPA on jagged tensors; K/V are expanded to the query heads, since torch's fused kernels need equal heads."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    m = metadata
    out = torch.nn.functional.scaled_dot_product_attention(
        _jagged(q, m.cu_seqlens_q, m.min_seqlen_q, m.max_seqlen_q),
        _jagged(k, m.cu_seqlens_k, m.min_seqlen_k, m.max_seqlen_k),
        _jagged(v, m.cu_seqlens_k, m.min_seqlen_k, m.max_seqlen_k),
        is_causal=options.causal,
        scale=options.scale,
    )
    values = out.transpose(1, 2).values()
    # The gradient becomes jagged values too: unfused, it must not be a view, so a product hands on a fresh one.
    return values if fused else values * 1


class SdpaNested(Kernel):
    """Jagged SDPA, with the dense mask wherever its causal mask does not fit.

    ``is_causal`` on jagged tensors is top-left in the memory-efficient kernel, so a document with more keys than
    queries needs the explicit mask. On CPU jagged tensors have no causal mask at all.
    """

    name = "sdpa_nested"
    paths = frozenset({"dense", "nested"})
    capabilities = Capabilities(
        head_dims_v=True,
        softcap=False,
        capacity=False,
        isolates_nonfinite=False,
        window=False,
        queries_without_keys=False,
        empty_documents=False,
        memories=ALIGNED_MEMORIES,
        repeatable_backward=False,
    )
    profile = Profile(stores_probabilities=True, expands_kv=True)

    def capabilities_on(self, device: str) -> Capabilities:
        if device != "cuda":
            return self.capabilities
        # The fused kernels behind jagged tensors want rows of whole 16 bytes, and no document without a query or a key:
        # for calls with one torch takes its unfused composition, which rounds elsewhere (sdpa_nested_math).
        return dataclasses.replace(self.capabilities, head_dim_multiple=8, keys_without_queries=False)

    def profile_on(self, device: str) -> Profile:
        # On CPU jagged tensors take the unfused composition, every step of it in the storage dtype; causal documents do
        # not, and may take the flash attention there.
        return as_flash_does(UNFUSED, device) if device == "cpu" else self.profile

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        if options.causal and (metadata.straddling or q.device.type == "cpu"):
            return Attended(dense_attention(q, k, v, metadata, options), None, "dense")
        return Attended(nested_attention(q, k, v, metadata, options, fused=q.device.type != "cpu"), None, "nested")


KERNEL = SdpaNested()
