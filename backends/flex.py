"""FlexAttention over a packed sequence: a block mask of documents, causality and windows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch

from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata

_FAR: Final = 1 << 30
"""An unbounded side of a window."""

FlexAttention = Callable[..., Any]


def mask_of(metadata: VarlenMetadata, options: AttentionOptions) -> Callable[..., torch.Tensor]:
    """The mask as FlexAttention wants it; all numbers are tensors, so that one compiled kernel serves every layout."""
    m = metadata
    document_q, document_k = m.document_index_q.long(), m.document_index_k.long()
    end_q, end_k = m.rows_from_end()
    sides = [_FAR if side < 0 else side for side in options.effective_window]
    # Filled on the device: a number that is copied there cannot be captured in a graph.
    left, right = (torch.full((), side, dtype=torch.long, device=m.device) for side in sides)

    def mask(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        distance = end_k[key] - end_q[row]
        return (document_q[row] == document_k[key]) & (distance <= left) & (-distance <= right)

    return mask


def _score_of(softcap: float, device: torch.device) -> Callable[..., torch.Tensor]:
    # A tensor too: a number would be a symbol to the compiler, which it cannot trace here.
    cap = torch.full((), softcap, dtype=torch.float32, device=device)

    def capped(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _with_lse(function: FlexAttention, *tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and row sums; newer releases ask for the latter in another way."""
    from torch.nn.attention import flex_attention as module

    if "return_aux" in inspect.signature(module.flex_attention).parameters:
        out, aux = function(*tensors, **options, return_aux=module.AuxRequest(lse=True))
        return out, aux.lse
    out, lse = function(*tensors, **options, return_lse=True)
    return out, lse


def flex(
    function: FlexAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    metadata: VarlenMetadata,
    options: AttentionOptions,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[tokens_q, heads, head_dim]`` and row sums ``[heads, tokens_q]``.

    Args:
        function: ``flex_attention``, compiled or not.
        q: ``[tokens_q, heads, head_dim]``.
        k: ``[tokens_k, kv_heads, head_dim]``.
        v: as ``k``.
        metadata: where the documents lie.
        options: scale, masks, softcap.
        more: further arguments of ``flex_attention``.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = create_block_mask(mask_of(metadata, options), None, None, len(q), len(k), device=str(q.device))
    out, lse = _with_lse(
        function,
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        score_mod=_score_of(options.softcap, q.device) if options.softcap else None,
        block_mask=blocks,
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        **more,
    )
    return out[0].transpose(0, 1), lse[0]
