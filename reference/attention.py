"""Attention over one document, in float64, as the textbook writes it, with closed-form gradients.

Shapes here are head-major, ``[..., heads, rows, channels]``; K/V have one head per *query* head (``expand_heads``).
Leading dimensions broadcast; values, and so the output and its gradient, may have
another number of channels (``dv``) than queries and keys. With s = scale q k^T, t = tanh(s / cap) where softcap is on:

    p = softmax(cap t  or  s)     o = p v            dv = p^T do       dp = do v^T
    D = rowsum(do * o)            dS = p (dp - D)    dq = scale (dS g) k    dk = scale (dS g)^T q      g = 1 - t^2

A gradient dL of the LSE, whose derivative by a score is that score's p, makes it dS = p (dp - D + dL).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Forward(NamedTuple):
    """What the forward of one document computes."""

    out: torch.Tensor
    """``[..., heads, q, dv]``; rows that see no key are 0."""
    lse: torch.Tensor
    """``[..., heads, q]`` natural log of the row sums; -inf for rows that see no key."""
    probabilities: torch.Tensor
    """``[..., heads, q, k]``."""
    slope: torch.Tensor
    """``[..., heads, q, k]`` derivative of the capped score by the score, 1 without softcap."""


class Gradients(NamedTuple):
    """Gradients of one document, K/V still per query head."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def allowed_keys(queries: int, keys: int, window: tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Which keys each query sees, bool ``[queries, keys]``.

    Args:
        queries: rows.
        keys: columns; query i stands on key ``i + keys - queries`` (bottom-right alignment).
        window: keys seen (left, right) of that one, -1 for no bound; causal is a right side of 0.
        device: where the mask is made.
    """
    own = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None, :]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    left, right = window
    if left >= 0:
        mask &= key >= own - left
    if right >= 0:
        mask &= key <= own + right
    return mask


def expand_heads(x: torch.Tensor, group: int) -> torch.Tensor:
    """K/V ``[..., kv_heads, k, d]`` to one head per query head."""
    return x.repeat_interleave(group, dim=-3)


def sum_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    """Adds up what the query heads of a group contribute: ``[..., heads, k, d]`` to ``[..., kv_heads, k, d]``."""
    return x.unflatten(-3, (-1, group)).sum(-3)


def softmax_rows(scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, lse) over the allowed keys; rows without any give zeros and -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    masked = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(masked, -1)
    probabilities = torch.exp(masked - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return probabilities, lse


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float = 0.0
) -> Forward:
    """Attention of one document.

    Args:
        q: ``[..., heads, q, d]`` float64.
        k: ``[..., heads, k, d]`` float64.
        v: ``[..., heads, k, dv]`` float64.
        mask: bool ``[q, k]``, True where a query sees a key.
        scale: softmax scale.
        softcap: 0 for none.
    """
    scores = scale * (q @ k.transpose(-1, -2))
    slope = torch.ones_like(scores)
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    probabilities, lse = softmax_rows(scores, mask)
    return Forward(probabilities @ v, lse, probabilities, slope)


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    result: Forward,
    dlse: torch.Tensor | None = None,
) -> Gradients:
    """Closed-form gradients of ``forward`` for the output gradient ``dout [..., heads, q, dv]``.

    Args:
        q: as ``forward`` was given it, and so ``k``, ``v`` and ``scale``.
        k: of one head per query head.
        v: likewise, with its own channels.
        dout: gradient of the output.
        scale: softmax scale.
        result: of ``forward``.
        dlse: ``[..., heads, q]``, gradient of the LSE; None for none.
    """
    dp = dout @ v.transpose(-1, -2)
    delta = (dout * result.out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    ds = result.probabilities * (dp - delta) * result.slope
    return Gradients(
        dq=scale * (ds @ k), dk=scale * (ds.transpose(-1, -2) @ q), dv=result.probabilities.transpose(-1, -2) @ dout
    )
