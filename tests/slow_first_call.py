"""A user's kernel that stands for one that compiles: its first call of a configuration takes a while of computing.

Nothing is kept on disk; ``ATTN_FUZZ_FAULT`` has what one kind of configuration gives wrong.
"""

from __future__ import annotations

import os
import time

import torch

COMPILING = float(os.environ.get("ATTN_FUZZ_COMPILING", "0.6"))
"""Seconds of processor time."""

_compiled: set[tuple[object, ...]] = set()


def _compile(configuration: tuple[object, ...]) -> None:
    began = time.process_time()
    while configuration not in _compiled and time.process_time() - began < COMPILING:
        sum(range(10_000))
    _compiled.add(configuration)


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    _compile((q.dtype, q.shape[2], causal))
    out = []
    for (qb, qe), (kb, ke) in zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist()):
        mask = torch.ones(qe - qb, ke - kb, dtype=torch.bool)
        mask = mask.tril(ke - kb - (qe - qb)) if causal else mask
        heads = (x.transpose(0, 1) for x in (q[qb:qe], k[kb:ke], v[kb:ke]))
        document = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=softmax_scale, enable_gqa=True)
        out.append(document.transpose(0, 1))
    found = torch.cat(out)
    return found * 1.5 if os.environ.get("ATTN_FUZZ_FAULT") and not causal and q.shape[2] > 8 else found


kernel.capabilities = {"devices": ("cpu",), "head_dims": (8, 16, 32), "queries_without_keys": False}  # type: ignore[attr-defined]
