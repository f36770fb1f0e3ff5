"""torch's memory-efficient (CUTLASS) attention, through the operator behind its public functions."""

from __future__ import annotations

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.profile import Profile

_NO_MASK, _BOTTOM_RIGHT = 0, 2


def packed_lse(padded: torch.Tensor, metadata: VarlenMetadata) -> torch.Tensor:
    """``[heads, tokens_q]`` of row sums that a kernel gives as ``[documents, heads, rows]``, padded at the end."""
    documents = metadata.document_index_q.long() - 1
    rows = torch.arange(len(documents), device=padded.device) - metadata.cu_seqlens_q[documents]
    return padded.detach()[documents, :, rows].T


class TorchEfficient(Kernel):
    """``torch.ops.aten._efficient_attention_forward`` with prefix sums; autograd knows its backward."""

    name = "torch_efficient"
    paths = frozenset({"aten._efficient_attention_forward"})
    capabilities = Capabilities(
        devices=("cuda",),
        head_dim_multiple=8,
        head_dims_v=True,
        gqa=False,
        window_needs_causal=True,
        window_convention="keys to the left, the row itself counted; causal only",
        softcap=False,
        # dQ of a document without keys stays unwritten, and causal rows left of the first key come out wrong.
        queries_without_keys=False,
        memories=(*ALIGNED_MEMORIES, "broadcast"),
        repeatable_backward=False,
        graphs=None,
        traceable=None,
        covers_all_rows=False,
        # The operator refuses bounds beyond the rows that there are ("Invalid max_seqlen_k").
        loose_max_seqlen=False,
        # 65,536 documents and more are more than its grids take, which is an error ("invalid argument").
        crowds=False,
        # Keys are found by 32 bits from their document's first one (backends/limits.py), and the operator refuses
        # strides of heads beyond that ("query.stride(2) overflows").
        far_memories=("far_base",),
    )
    # The backward forms dS from P as its tiles keep it, in the storage dtype.
    profile = Profile(stores_probabilities=True)

    call_source = """def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    sums = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    window = WINDOW[0] + 1 if WINDOW[0] >= 0 else None
    return torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, *sums, 0.0, 2 if CAUSAL else 0, True, scale=SCALE, window_size=window
    )[0][0]"""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        left = options.window[0]
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            q[None],
            k[None],
            v[None],
            None,
            metadata.cu_seqlens_q,
            metadata.cu_seqlens_k,
            metadata.max_seqlen_q,
            metadata.max_seqlen_k,
            0.0,
            _BOTTOM_RIGHT if options.causal else _NO_MASK,
            True,
            scale=options.scale,
            window_size=left + 1 if left >= 0 else None,
        )
        return Attended(out[0], packed_lse(lse, metadata), "aten._efficient_attention_forward")


KERNEL = TorchEfficient()
