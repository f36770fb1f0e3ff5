"""sglang 0.5.23: a Triton prefill of packed ``[t, h, d]`` that writes into an output of the caller's; forward only."""

import torch
from sglang.kernels.ops.attention.prefill_attention import context_attention_fwd

from attn_fuzz import adapters


def prefill(q, k, v, cu_seqlens, lengths_q, max_seqlen, causal, softmax_scale):
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    context_attention_fwd(q, k, v, out, cu_seqlens, lengths_q, max_seqlen, causal, softmax_scale)
    return out


kernel = adapters.forward_only(adapters.varlen(prefill), capabilities={"devices": ("cuda",), "dtypes": ("bf16",)})
