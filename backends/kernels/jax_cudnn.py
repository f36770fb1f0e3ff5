"""cuDNN attention as JAX integrates it, fed through DLPack with documents as padded batch elements."""

from __future__ import annotations

import importlib.util
from typing import Final

import torch

from attn_fuzz.backends.jax_bridge import BATCHES, ROWS, Options, PaddedAttention, bucket
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Configuration, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import MEMORIES
from attn_fuzz.reference.profile import Profile

CONFIGURATIONS: Final = (
    Configuration("bf16", 64, 4, 2, True),
    Configuration("bf16", 64, 4, 2, True, "left"),
    Configuration("bf16", 64, 2, 2, False),
    Configuration("fp16", 128, 1, 1, True),
)


def _places(index: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(document, row within it) of every token."""
    documents = index.long() - 1
    return documents, torch.arange(len(index), device=index.device) - cu_seqlens[documents]


class JaxCudnn(Kernel):
    """``jax.nn.dot_product_attention(implementation="cudnn")``; its causal mask is top-left."""

    name = "jax_cudnn"
    paths = frozenset({"jax cudnn"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        head_dims=(64, 128),
        causal_needs_equal_lengths=True,
        window_needs_causal=True,
        softcap=False,
        scale=False,
        memories=MEMORIES,
        capacity=False,
        repeatable_backward=False,
        configurations=CONFIGURATIONS,
        window_sizes=(0, 7, 64),
        layouts=8,
    )
    # Every query head's dK and dV are stored before those of a group are added up: z up to 8.7 with grouped heads, 3.8
    # without.
    profile = Profile(expands_kv=True)

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        if importlib.util.find_spec("jax") is None:
            return "the package jax is not installed"
        if (
            importlib.util.find_spec("jax_cuda13_plugin") is None
            and importlib.util.find_spec("jax_cuda12_plugin") is None
        ):
            return "jax is installed without its CUDA plugin"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        m = metadata
        batch = bucket(len(m.lengths_q), BATCHES)
        rows_q, rows_k = bucket(m.max_seqlen_q, ROWS), bucket(m.max_seqlen_k, ROWS)
        places_q = _places(m.document_index_q, m.cu_seqlens_q)
        places_k = _places(m.document_index_k, m.cu_seqlens_k)
        padded = [
            x.new_zeros(batch, rows, *x.shape[1:]).index_put(places, x)
            for x, rows, places in ((q, rows_q, places_q), (k, rows_k, places_k), (v, rows_k, places_k))
        ]
        # Batch elements behind the last document hold one row of zeros, as padded batches do.
        lengths = [
            torch.tensor([*some, *[1] * (batch - len(some))], dtype=torch.int32, device=q.device)
            for some in (m.lengths_q, m.lengths_k)
        ]
        out = PaddedAttention.apply(*padded, *lengths, Options(options.scale, options.causal, options.window[0]))
        return Attended(out[places_q], None, "jax cudnn")


KERNEL = JaxCudnn()
