"""A Triton varlen attention with a backward: grouped heads, bottom-right causal, any document lengths.

python -m attn_fuzz check examples/triton_varlen.py:kernel --device cuda
"""

import torch
import triton
import triton.language as tl

ROWS, KEYS = 32, 32


@triton.jit
def _scores(q, k, row, key, queries, keys, scale, CAUSAL: tl.constexpr):
    """Scores of a tile, -inf where the row does not see the key."""
    seen = (row[:, None] < queries) & (key[None, :] < keys)
    if CAUSAL:
        seen = seen & (key[None, :] <= row[:, None] + keys - queries)
    return tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))


@triton.jit
def _tile(x, rows, limit, channels, head, stride_row, stride_head, HEAD_DIM: tl.constexpr):
    """Rows of one head, zeros beyond the document."""
    inside = (rows[:, None] < limit) & (channels[None, :] < HEAD_DIM)
    return tl.load(x + rows[:, None] * stride_row + head * stride_head + channels[None, :], mask=inside, other=0.0)


@triton.jit
def _forward(
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    tokens_q,
    scale,
    sqt,
    sqh,
    skt,
    skh,
    svt,
    svh,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    document, head = tl.program_id(1), tl.program_id(2)
    first_q, first_k = tl.load(cu_q + document), tl.load(cu_k + document)
    queries, keys = tl.load(cu_q + document + 1) - first_q, tl.load(cu_k + document + 1) - first_k
    row, channels = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    q_tile = _tile(q + first_q * sqt, row, queries, channels, head, sqt, sqh, HEAD_DIM)
    largest = tl.full((M,), -float("inf"), tl.float32)
    total, sums = tl.zeros((M,), tl.float32), tl.zeros((M, WIDTH), tl.float32)
    for begin in range(0, keys, N):
        key = begin + tl.arange(0, N)
        k_tile = _tile(k + first_k * skt, key, keys, channels, head // GROUP, skt, skh, HEAD_DIM)
        v_tile = _tile(v + first_k * svt, key, keys, channels, head // GROUP, svt, svh, HEAD_DIM)
        scores = _scores(q_tile, k_tile, row, key, queries, keys, scale, CAUSAL)
        above = tl.maximum(largest, tl.max(scores, 1))
        # Rows that have seen no key yet stay at -inf, and exp(-inf - -inf) is no number.
        base = tl.where(above == -float("inf"), 0.0, above)
        weights, shrink = tl.exp(scores - base[:, None]), tl.exp(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        largest = above
    blind = total == 0.0
    result = tl.where(blind[:, None], 0.0, sums / tl.where(blind, 1.0, total)[:, None])
    inside = (row[:, None] < queries) & (channels[None, :] < HEAD_DIM)
    place = (first_q + row[:, None]) * heads * HEAD_DIM + head * HEAD_DIM + channels[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
    normaliser = tl.where(blind, -float("inf"), largest + tl.log(tl.where(blind, 1.0, total)))
    tl.store(lse + head * tokens_q + first_q + row, normaliser, mask=row < queries)


@triton.jit
def _d_scores(scores, lse, d_weights, delta):
    """(P, dS) of a tile from its scores, row sums, dP and rowsum(dO * O)."""
    weights = tl.where(scores == -float("inf"), 0.0, tl.exp(scores - tl.where(lse == -float("inf"), 0.0, lse)[:, None]))
    return weights, weights * (d_weights - delta[:, None])


@triton.jit
def _backward_q(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    cu_q,
    cu_k,
    tokens_q,
    scale,
    sqt,
    sqh,
    skt,
    skh,
    svt,
    svh,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    document, head = tl.program_id(1), tl.program_id(2)
    first_q, first_k = tl.load(cu_q + document), tl.load(cu_k + document)
    queries, keys = tl.load(cu_q + document + 1) - first_q, tl.load(cu_k + document + 1) - first_k
    row, channels = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    packed = heads * HEAD_DIM
    q_tile = _tile(q + first_q * sqt, row, queries, channels, head, sqt, sqh, HEAD_DIM)
    d_tile = _tile(dout + first_q * packed, row, queries, channels, head, packed, HEAD_DIM, HEAD_DIM)
    row_sums = tl.load(lse + head * tokens_q + first_q + row, mask=row < queries, other=0.0)
    d_row = tl.load(delta + head * tokens_q + first_q + row, mask=row < queries, other=0.0)
    sums = tl.zeros((M, WIDTH), tl.float32)
    for begin in range(0, keys, N):
        key = begin + tl.arange(0, N)
        k_tile = _tile(k + first_k * skt, key, keys, channels, head // GROUP, skt, skh, HEAD_DIM)
        v_tile = _tile(v + first_k * svt, key, keys, channels, head // GROUP, svt, svh, HEAD_DIM)
        scores = _scores(q_tile, k_tile, row, key, queries, keys, scale, CAUSAL)
        d_weights = tl.dot(d_tile, tl.trans(v_tile), input_precision="ieee")
        _, d_scores = _d_scores(scores, row_sums, d_weights, d_row)
        sums += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision="ieee")
    inside = (row[:, None] < queries) & (channels[None, :] < HEAD_DIM)
    place = (first_q + row[:, None]) * packed + head * HEAD_DIM + channels[None, :]
    tl.store(dq + place, (sums * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kv(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    cu_q,
    cu_k,
    tokens_q,
    scale,
    sqt,
    sqh,
    skt,
    skh,
    svt,
    svh,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    document, kv_head = tl.program_id(1), tl.program_id(2)
    first_q, first_k = tl.load(cu_q + document), tl.load(cu_k + document)
    queries, keys = tl.load(cu_q + document + 1) - first_q, tl.load(cu_k + document + 1) - first_k
    key, channels = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, WIDTH)
    k_tile = _tile(k + first_k * skt, key, keys, channels, kv_head, skt, skh, HEAD_DIM)
    v_tile = _tile(v + first_k * svt, key, keys, channels, kv_head, svt, svh, HEAD_DIM)
    packed = heads * HEAD_DIM
    dk_sums, dv_sums = tl.zeros((N, WIDTH), tl.float32), tl.zeros((N, WIDTH), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for begin in range(0, queries, M):
            row = begin + tl.arange(0, M)
            q_tile = _tile(q + first_q * sqt, row, queries, channels, head, sqt, sqh, HEAD_DIM)
            d_tile = _tile(dout + first_q * packed, row, queries, channels, head, packed, HEAD_DIM, HEAD_DIM)
            row_sums = tl.load(lse + head * tokens_q + first_q + row, mask=row < queries, other=0.0)
            d_row = tl.load(delta + head * tokens_q + first_q + row, mask=row < queries, other=0.0)
            scores = _scores(q_tile, k_tile, row, key, queries, keys, scale, CAUSAL)
            d_weights = tl.dot(d_tile, tl.trans(v_tile), input_precision="ieee")
            weights, d_scores = _d_scores(scores, row_sums, d_weights, d_row)
            dv_sums += tl.dot(tl.trans(weights).to(d_tile.dtype), d_tile, input_precision="ieee")
            dk_sums += tl.dot(tl.trans(d_scores).to(q_tile.dtype), q_tile, input_precision="ieee")
    inside = (key[:, None] < keys) & (channels[None, :] < HEAD_DIM)
    place = (first_k + key[:, None]) * (heads // GROUP) * HEAD_DIM + kv_head * HEAD_DIM + channels[None, :]
    tl.store(dk + place, (dk_sums * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, dv_sums.to(dv.dtype.element_ty), mask=inside)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
        # Rows behind the last document are part of none, and are zero.
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.full((q.shape[1], len(q)), -torch.inf, device=q.device)
        ctx.shape = (len(cu_q) - 1, max_q, max_k)
        ctx.options = {
            "GROUP": q.shape[1] // k.shape[1],
            "HEAD_DIM": q.shape[2],
            "CAUSAL": causal,
            "M": ROWS,
            "N": KEYS,
        }
        ctx.options["WIDTH"] = max(16, triton.next_power_of_2(q.shape[2]))
        ctx.numbers = (len(q), scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], q.shape[1])
        if max_q:
            grid = (triton.cdiv(max_q, ROWS), ctx.shape[0], q.shape[1])
            _forward[grid](q, k, v, out, lse, cu_q, cu_k, *ctx.numbers, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        dout = dout.contiguous()
        delta = (out.float() * dout.float()).sum(-1).T.contiguous()
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        documents, max_q, max_k = ctx.shape
        shared = (q, k, v, dout, lse, delta)
        if max_q:
            grid = (triton.cdiv(max_q, ROWS), documents, q.shape[1])
            _backward_q[grid](*shared, dq, cu_q, cu_k, *ctx.numbers, **ctx.options)
        if max_k:
            grid = (triton.cdiv(max_k, KEYS), documents, k.shape[1])
            _backward_kv[grid](*shared, dk, dv, cu_q, cu_k, *ctx.numbers, **ctx.options)
        return dq, dk, dv, None, None, None, None, None, None


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal)


# The last dimension is taken to be contiguous, and rows behind the last document are zero.
kernel.capabilities = {
    "max_head_dim": 128,
    "memories": ["contiguous", "fused", "head_major", "sliced", "mixed", "misaligned"],
    "capacity": True,
    "covers_all_rows": True,
    "isolates_nonfinite": True,
}
