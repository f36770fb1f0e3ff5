"""Kernels made by adapters of real functions, right ones and wrong ones, for tests/test_adapters.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attn_fuzz import adapters
from attn_fuzz.adapters import Lse

Tensor = torch.Tensor
BOTTOM_RIGHT = {"causal_needs_equal_lengths": False}
MASKED: Any = {"names": {"mask": "attn_mask", "softmax_scale": "scale"}, "capabilities": {"gqa": False}}
"""torch's SDPA, which groups heads only when it is told to."""


# One document at a time, or a pack under a loop over documents: what the others are made of.


def textbook(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``[..., heads, rows, channels]``, grouped heads; (out, lse ``[..., heads, rows]``)."""
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.float().repeat_interleave(group, -3) for x in (k, v))
    scores = (q.float() @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1)


def causal_mask(queries: int, keys: int, *, causal: bool) -> Tensor:
    mask = torch.ones(queries, keys, dtype=torch.bool)
    return mask.tril(keys - queries) if causal else mask


def varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, sums_q: Tensor, sums_k: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """A pack ``[t, h, d]``: out and LSE ``[t, h]``, rows without a document zero and -inf."""
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for (qb, qe), (kb, ke) in zip(sums_q.unfold(0, 2, 1).tolist(), sums_k.unfold(0, 2, 1).tolist(), strict=True):
        heads = (x.transpose(0, 1) for x in (q[qb:qe], k[kb:ke], v[kb:ke]))
        some, sums = textbook(*heads, causal_mask(qe - qb, ke - kb, causal=causal), scale)
        rows = torch.arange(qb, qe)
        out = out.index_put((rows,), some.transpose(0, 1))
        lse[qb:qe] = sums.detach().T
    return out, lse


# dense: elements of a batch, with what is padding.

dense_mask = adapters.dense(sdpa, layout="bhsd", **MASKED)


def with_lengths(
    q: Tensor, k: Tensor, v: Tensor, lengths_k: Tensor, *, softmax_scale: float, is_causal: bool
) -> Tensor:
    """``[b, s, h, d]``; rows are counted from the front."""
    keys = torch.arange(k.shape[1])
    mask = (keys < lengths_k[:, None])[:, None, None]
    mask = mask & (keys <= torch.arange(q.shape[1])[:, None]) if is_causal else mask
    return textbook(*(x.transpose(1, 2) for x in (q, k, v)), mask, softmax_scale)[0].transpose(1, 2)


dense_lengths = adapters.dense(with_lengths, names={"causal": "is_causal"}, multiple=8)


def with_key_mask(q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return textbook(q, k, v, key_padding_mask[:, None, None], scale)


dense_key_mask = adapters.dense(
    with_key_mask,
    layout="bhsd",
    names={"key_mask": "key_padding_mask", "softmax_scale": "scale"},
    lse=Lse("bhs"),
)


# block_diagonal: the pack as one sequence.

block_mask = adapters.block_diagonal(sdpa, layout="bhsd", **MASKED)


def by_segments(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, softmax_scale: float, causal: bool) -> Tensor:
    """Self-attention ``[1, t, h, d]``, one id of a token's query and key."""
    same = ids[:, :, None] == ids[:, None]
    mask = same & causal_mask(q.shape[1], k.shape[1], causal=causal)
    return textbook(*(x.transpose(1, 2) for x in (q, k, v)), mask[:, None], softmax_scale)[0].transpose(1, 2)


block_ids = adapters.block_diagonal(by_segments, multiple=16)


# by_document.


@adapters.by_document
def document_bshd(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """torch's own causal mask counts rows from the front."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(*heads, scale=softmax_scale, is_causal=causal, enable_gqa=True).transpose(1, 2)


document_mask = adapters.by_document(
    sdpa, layout="hsd", names={"mask": "attn_mask", "softmax_scale": "scale"}, capabilities={"gqa": False}
)


def bottom_right(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, None, Tensor]:
    """``[s, h, d]``; the LSE in base 2 is the third that it gives."""
    out, lse = textbook(
        *(x.transpose(0, 1) for x in (q, k, v)), causal_mask(len(q), len(k), causal=causal), softmax_scale
    )
    return out.transpose(0, 1), None, lse.T / math.log(2)


document_lse = adapters.by_document(
    bottom_right, layout="shd", lse=Lse("sh", base="2", index=2), capabilities=BOTTOM_RIGHT
)


# varlen: other orders, names, axes, LSE.


def positional(
    q: Tensor, k: Tensor, v: Tensor, longest_q: int, sums_q: Tensor, sums_k: Tensor, is_causal: bool, *, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """``[h, t, d]``."""
    del longest_q
    heads = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = varlen_reference(*heads, sums_q, sums_k, sm_scale, causal=is_causal)
    return out.transpose(0, 1), lse


order = adapters.varlen(
    positional,
    arguments=("q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "cu_seqlens_k", "causal"),
    names={"softmax_scale": "sm_scale"},
    layout="htd",
    lse=Lse("th"),
)


def qkvpacked(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, softmax_scale: float, causal: bool) -> Tensor:
    assert max_seqlen == int(cu_seqlens.diff().max())
    return varlen_reference(*qkv.unbind(1), cu_seqlens, cu_seqlens, softmax_scale, causal=causal)[0]


qkv = adapters.packed_qkv(qkvpacked)


def kvpacked(q: Tensor, kv: Tensor, sums_q: Tensor, sums_k: Tensor, longest_q: int, longest_k: int, softmax_scale: float, causal: bool) -> tuple[Tensor, Tensor]:  # fmt: skip  # noqa: E501
    out, lse = varlen_reference(q, *kv.unbind(1), sums_q, sums_k, softmax_scale, causal=causal)
    return out, lse.T


kv = adapters.packed_kv(kvpacked, lse=Lse("ht"))


# forward_only.


def prefill(q: Tensor, k: Tensor, v: Tensor, sums_q: Tensor, sums_k: Tensor, longest_q: int, longest_k: int, *, softmax_scale: float, causal: bool) -> Tensor:  # fmt: skip  # noqa: E501
    return varlen_reference(q.detach(), k.detach(), v.detach(), sums_q, sums_k, softmax_scale, causal=causal)[0]


forward = adapters.forward_only(prefill)
forward_lse = adapters.forward_only(kv)


# from_module.


class Attention(torch.nn.Module):
    """``[b, h, s, d]``, options of its constructor."""

    def __init__(self, heads: int, causal: bool, scale: float) -> None:
        super().__init__()
        self.heads, self.causal, self.scale = heads, causal, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[1] == self.heads
        mask = causal_mask(q.shape[2], k.shape[2], causal=self.causal)
        return sdpa(q, k, v, mask, scale=self.scale, enable_gqa=True)


module = adapters.by_document(
    adapters.from_module(lambda heads, causal, softmax_scale: Attention(heads, causal, softmax_scale), layout="bhsd"),
    layout="bhsd",
    capabilities=BOTTOM_RIGHT,
)


class Fixed(torch.nn.Module):
    """``[b, s, h, d]``, always causal."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)


instance = adapters.by_document(Fixed(), capabilities={"causal": True, "noncausal": False})


# Documents without keys, of which functions hear nothing.

_BLIND: Any = {**MASKED, "capabilities": {"gqa": False, "queries_without_keys": True}}
blind_dense = adapters.dense(sdpa, layout="bhsd", **_BLIND)
blind_block = adapters.block_diagonal(sdpa, layout="bhsd", **_BLIND)
blind_document = adapters.by_document(
    bottom_right, layout="shd", lse=Lse("sh", base="2", index=2), capabilities={"queries_without_keys": True}
)

# Wrong ones.


wrong_axes = adapters.dense(sdpa, layout="bshd", **MASKED)
"""Heads and rows taken for one another, which no shape tells."""


def no_last_row(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    out = sdpa(q, k, v, attn_mask, scale=scale)
    return torch.cat([out[:, :, :-1], torch.zeros_like(out[:, :, -1:])], 2)


wrong_last_row = adapters.dense(no_last_row, layout="bhsd", **MASKED)
wrong_block = adapters.block_diagonal(
    lambda q, k, v, attn_mask, scale: sdpa(q, k, v, torch.ones_like(attn_mask), scale=scale), layout="bhsd", **MASKED
)
wrong_key_mask = adapters.dense(
    lambda q, k, v, mask, scale: textbook(q, k, v, torch.ones_like(mask[:, None, None]), scale)[0],
    layout="bhsd",
    names={"mask": None, "key_mask": "mask", "softmax_scale": "scale"},
)
wrong_lse_zeros = adapters.by_document(
    lambda q, k, v, softmax_scale: (document_rows(q, k, v, softmax_scale), torch.zeros(1, q.shape[1], q.shape[2])),
    layout="bhsd",
    lse=Lse("bhs"),
)
wrong_lse_base = adapters.packed_kv(kvpacked, lse=Lse("ht", base="2"))
wrong_order = adapters.varlen(
    lambda v, k, q, sums_q, sums_k, softmax_scale: varlen_reference(
        q, k, v, sums_q, sums_k, softmax_scale, causal=False
    )[0],
    arguments=("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
)
wrong_qkv = adapters.packed_qkv(lambda qkv, sums, longest, softmax_scale: qkvpacked(qkv[:, [0, 2, 1]], sums, longest, softmax_scale=softmax_scale, causal=False))  # fmt: skip  # noqa: E501
wrong_forward = adapters.forward_only(adapters.varlen(lambda *arguments, **options: prefill(*arguments, **options) * 1.02, names={"softmax_scale": "softmax_scale", "causal": "causal"}))  # fmt: skip  # noqa: E501
wrong_module = adapters.by_document(
    adapters.from_module(
        lambda heads, causal, softmax_scale: Attention(heads, causal, 1.02 * softmax_scale), layout="bhsd"
    ),
    layout="bhsd",
)
wrong_top_left = adapters.by_document(Fixed(), capabilities={**instance.capabilities, **BOTTOM_RIGHT})


def document_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return sdpa(q, k, v, scale=scale, enable_gqa=True)


# What gives something else than was asked for.

misshapen_document = adapters.by_document(lambda q, k, v: q[:, :-1])
misshapen_lse = adapters.by_document(lambda q, k, v: (q, q), lse=Lse("bsh"))


def no_lse(q, k, v, sums_q, sums_k, longest_q, longest_k):  # type: ignore[no-untyped-def]
    """Declares an LSE, and gives none."""
    return prefill(q, k, v, sums_q, sums_k, longest_q, longest_k, softmax_scale=q.shape[-1] ** -0.5, causal=False)


no_lse.capabilities = {"lse": True}  # type: ignore[attr-defined]
