"""Triton kernels behind fused_answer.py: answers and budgets of attention.py and budget.py in float32, tile by tile.

One program of ``rows_kernel`` takes some query rows of one document and head, one of ``keys_kernel`` some keys of one
document and K/V head. Inputs are half precision, so that products are exact and only sums round; P and dS enter their
products in three TF32 parts. Variances are sums of positive numbers and take single TF32 products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_fuzz.reference.fused_answer_terms import degrees_of, ds_of, inverse_deviation, rvar, scores_of, seen_by, tanh


@triton.jit(do_not_specialize=["left", "right", "heads", "group"])
def rows_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, cu_q_ptr, cu_k_ptr,
    out_ptr, out_inverse_ptr, out_degrees_ptr, dq_ptr, dq_inverse_ptr, dq_degrees_ptr, lse_ptr, lse_inverse_ptr,
    delta_ptr, delta_variance_ptr, shared_ptr,
    q_row, q_head, q_channel, k_row, k_head, k_channel, v_row, v_head, v_channel, do_row, do_head, do_channel,
    scale, softcap, factor, exp_variance, tanh_variance, relative, smallest, subnormal, stores_p, by_lse,
    left, right, heads, group, D,
    BD: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    A2: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out, lse and dq with their budgets; what the keys' kernel needs of each row."""
    document, head = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BM
    q_begin = tl.load(cu_q_ptr + document)
    queries = tl.load(cu_q_ptr + document + 1) - q_begin
    k_begin = tl.load(cu_k_ptr + document)
    keys = tl.load(cu_k_ptr + document + 1) - k_begin
    if first >= queries:
        return
    row = first + tl.arange(0, BM)
    channel = tl.arange(0, BD)
    # A mask that the compiler knows to be true costs nothing.
    width = D
    if EVEN:
        width = BD
    there = (row < queries)[:, None] & (channel < width)[None, :]
    token = (q_begin + row).to(tl.int64)
    q = tl.load(q_ptr + token[:, None] * q_row + head * q_head + channel[None, :] * q_channel, mask=there, other=0.0)
    do = tl.load(
        do_ptr + token[:, None] * do_row + head * do_head + channel[None, :] * do_channel, mask=there, other=0.0
    )
    q_wide, do_wide = q.to(tl.float32), do.to(tl.float32)
    q2, do2 = q_wide * q_wide, do_wide * do_wide
    own = row + keys - queries
    kv_head = head // group
    low = 0
    if left >= 0:
        low = tl.maximum(first + keys - queries - left, 0) // BN * BN
    high = keys
    if right >= 0:
        high = tl.minimum(keys, first + BM + keys - queries + right)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(low, high, BN):
        key = start + tl.arange(0, BN)
        seen = seen_by(row < queries, key, keys, own, left, right)
        place = (k_begin + key).to(tl.int64)
        inside = (channel < width)[:, None] & (key < keys)[None, :]
        k = tl.load(
            k_ptr + place[None, :] * k_row + kv_head * k_head + channel[:, None] * k_channel, mask=inside, other=0.0
        )
        s = tl.dot(q_wide, k.to(tl.float32), input_precision="tf32") * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        s = tl.where(seen, s, float("-inf"))
        larger = tl.maximum(m, tl.max(s, 1))
        anchor = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(m - anchor) + tl.sum(tl.exp(s - anchor[:, None]), 1)
        m = larger
    blind = m == float("-inf")
    lse = tl.where(blind, 0.0, m + tl.log(tl.where(blind, 1.0, total)))
    out = tl.zeros([BM, BD], tl.float32)
    spread = tl.zeros([BM, BD], tl.float32)
    shared = tl.zeros([BM], tl.float32)
    out_sources = tl.zeros([BM], tl.float32)
    for start in range(low, high, BN):
        key = start + tl.arange(0, BN)
        seen = seen_by(row < queries, key, keys, own, left, right)
        place = (k_begin + key).to(tl.int64)
        inside = (channel < width)[:, None] & (key < keys)[None, :]
        k = tl.load(
            k_ptr + place[None, :] * k_row + kv_head * k_head + channel[:, None] * k_channel, mask=inside, other=0.0
        )
        within = (key < keys)[:, None] & (channel < width)[None, :]
        v = tl.load(
            v_ptr + place[:, None] * v_row + kv_head * v_head + channel[None, :] * v_channel, mask=within, other=0.0
        )
        k_wide, v_wide = k.to(tl.float32), v.to(tl.float32)
        s, slope, vs, raw = scores_of(
            q_wide, k_wide, q2, k_wide * k_wide, seen, scale, softcap, exp_variance, tanh_variance, A2, SOFTCAP
        )
        p = tl.exp(s - lse[:, None])
        w = p * p * vs
        shared += tl.sum(w, 1)
        out += tl.dot(p, v_wide, input_precision="tf32x3")
        weight = rvar(p, relative, smallest, subnormal) + A2 * p + w
        v2 = v_wide * v_wide
        spread += tl.dot(weight, v2, input_precision="tf32")
        share = weight * tl.sum(v2, 1)[None, :]
        out_sources += tl.sum(share * share, 1)
    out_stored = rvar(out, relative, smallest, subnormal)
    out_variance = spread + out * out * shared[:, None] + out_stored
    stored_lse = A2 * lse * lse * 0.0625
    out_variance += by_lse * stored_lse[:, None] * out * out
    shared += stored_lse
    shared = tl.where(blind, 0.0, shared)
    product = do_wide * out
    delta = tl.sum(product, 1)
    delta_variance = tl.sum(do2 * out_variance, 1) + A2 * tl.sum(product * product, 1)
    dq = tl.zeros([BM, BD], tl.float32)
    dq_spread = tl.zeros([BM, BD], tl.float32)
    pk = tl.zeros([BM, BD], tl.float32)
    dq_sources = tl.zeros([BM], tl.float32)
    for start in range(low, high, BN):
        key = start + tl.arange(0, BN)
        seen = seen_by(row < queries, key, keys, own, left, right)
        place = (k_begin + key).to(tl.int64)
        inside = (channel < width)[:, None] & (key < keys)[None, :]
        k = tl.load(
            k_ptr + place[None, :] * k_row + kv_head * k_head + channel[:, None] * k_channel, mask=inside, other=0.0
        )
        v = tl.load(
            v_ptr + place[None, :] * v_row + kv_head * v_head + channel[:, None] * v_channel, mask=inside, other=0.0
        )
        k_wide, v_wide = k.to(tl.float32), v.to(tl.float32)
        k2 = k_wide * k_wide
        s, slope, vs, raw = scores_of(
            q_wide, k_wide, q2, k2, seen, scale, softcap, exp_variance, tanh_variance, A2, SOFTCAP
        )
        p = tl.exp(s - lse[:, None])
        dp = tl.dot(do_wide, v_wide, input_precision="tf32")
        var_dp = A2 * tl.dot(do2, v_wide * v_wide, input_precision="tf32")
        ds, var_ds = ds_of(
            p, slope, vs, raw, dp, delta[:, None], var_dp, scale, softcap, factor, tanh_variance,
            relative, smallest, subnormal, stores_p, A2, SOFTCAP,
        )  # fmt: skip
        dq += tl.dot(ds, tl.trans(k_wide), input_precision="tf32x3")
        by_query = var_ds + A2 * ds * ds
        dq_spread += tl.dot(by_query, tl.trans(k2), input_precision="tf32")
        share = by_query * (scale * scale * tl.sum(k2, 0))[None, :]
        dq_sources += tl.sum(share * share, 1)
        pk += tl.dot(p * slope, tl.trans(k_wide), input_precision="tf32")
    dq = scale * dq
    dq_variance = scale * scale * (dq_spread + delta_variance[:, None] * pk * pk) + shared[:, None] * dq * dq
    dq_stored = rvar(dq, relative, smallest, subnormal)
    dq_variance += dq_stored
    of_delta = delta_variance * scale * scale * tl.sum(pk * pk, 1)
    of_row = shared * tl.sum(dq * dq, 1)
    dq_sources += of_delta * of_delta + of_row * of_row
    place = (token[:, None] * heads + head) * D + channel[None, :]
    tl.store(out_ptr + place, out, mask=there)
    tl.store(out_inverse_ptr + place, inverse_deviation(out_variance), mask=there)
    tl.store(dq_ptr + place, dq, mask=there)
    tl.store(dq_inverse_ptr + place, inverse_deviation(dq_variance), mask=there)
    real = row < queries
    each = token * heads + head
    tl.store(lse_ptr + each, tl.where(blind, float("-inf"), lse), mask=real)
    tl.store(lse_inverse_ptr + each, inverse_deviation(shared + A2 * (1.0 + lse * lse)), mask=real)
    tl.store(delta_ptr + each, delta, mask=real)
    tl.store(delta_variance_ptr + each, delta_variance, mask=real)
    tl.store(shared_ptr + each, shared, mask=real)
    tl.store(out_degrees_ptr + each, degrees_of(out_sources, out_stored, out_variance, D), mask=real)
    tl.store(dq_degrees_ptr + each, degrees_of(dq_sources, dq_stored, dq_variance, D), mask=real)


@triton.jit(do_not_specialize=["left", "right", "heads", "group"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, cu_q_ptr, cu_k_ptr,
    dk_ptr, dk_inverse_ptr, dk_degrees_ptr, dv_ptr, dv_inverse_ptr, dv_degrees_ptr,
    lse_ptr, delta_ptr, delta_variance_ptr, shared_ptr,
    q_row, q_head, q_channel, k_row, k_head, k_channel, v_row, v_head, v_channel, do_row, do_head, do_channel,
    scale, softcap, factor, exp_variance, tanh_variance, relative, smallest, subnormal, stores_p, expands,
    left, right, heads, group, D,
    BD: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    A2: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dk and dv with their budgets."""
    document, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BN
    q_begin = tl.load(cu_q_ptr + document)
    queries = tl.load(cu_q_ptr + document + 1) - q_begin
    k_begin = tl.load(cu_k_ptr + document)
    keys = tl.load(cu_k_ptr + document + 1) - k_begin
    if first >= keys:
        return
    key = first + tl.arange(0, BN)
    channel = tl.arange(0, BD)
    # A mask that the compiler knows to be true costs nothing.
    width = D
    if EVEN:
        width = BD
    place = (k_begin + key).to(tl.int64)
    there = (key < keys)[:, None] & (channel < width)[None, :]
    inside = (channel < width)[:, None] & (key < keys)[None, :]
    k = tl.load(
        k_ptr + place[None, :] * k_row + kv_head * k_head + channel[:, None] * k_channel, mask=inside, other=0.0
    )
    v = tl.load(
        v_ptr + place[None, :] * v_row + kv_head * v_head + channel[:, None] * v_channel, mask=inside, other=0.0
    )
    k_wide, v_wide = k.to(tl.float32), v.to(tl.float32)
    k2, v2 = k_wide * k_wide, v_wide * v_wide
    # Query i stands on key i + keys - queries.
    low = 0
    if right >= 0:
        low = tl.maximum(first - right - keys + queries, 0) // BM * BM
    high = queries
    if left >= 0:
        high = tl.minimum(queries, first + BN + left - keys + queries)
    dk = tl.zeros([BN, BD], tl.float32)
    dk_variance = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    dv_variance = tl.zeros([BN, BD], tl.float32)
    dk_sources = tl.zeros([BN], tl.float32)
    dv_sources = tl.zeros([BN], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        dk_head = tl.zeros([BN, BD], tl.float32)
        dv_head = tl.zeros([BN, BD], tl.float32)
        for start in range(low, high, BM):
            row = start + tl.arange(0, BM)
            own = row + keys - queries
            real = row < queries
            seen = seen_by(real, key, keys, own, left, right)
            token = (q_begin + row).to(tl.int64)
            within = real[:, None] & (channel < width)[None, :]
            q = tl.load(
                q_ptr + token[:, None] * q_row + head * q_head + channel[None, :] * q_channel, mask=within, other=0.0
            )
            do = tl.load(
                do_ptr + token[:, None] * do_row + head * do_head + channel[None, :] * do_channel,
                mask=within,
                other=0.0,
            )
            q_wide, do_wide = q.to(tl.float32), do.to(tl.float32)
            q2, do2 = q_wide * q_wide, do_wide * do_wide
            each = token * heads + head
            lse = tl.load(lse_ptr + each, mask=real, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            delta = tl.load(delta_ptr + each, mask=real, other=0.0)
            delta_variance = tl.load(delta_variance_ptr + each, mask=real, other=0.0)
            shared = tl.load(shared_ptr + each, mask=real, other=0.0)
            s, slope, vs, raw = scores_of(
                q_wide, k_wide, q2, k2, seen, scale, softcap, exp_variance, tanh_variance, A2, SOFTCAP
            )
            p = tl.exp(s - lse[:, None])
            dp = tl.dot(do_wide, v_wide, input_precision="tf32")
            var_dp = A2 * tl.dot(do2, v2, input_precision="tf32")
            ds, var_ds = ds_of(
                p, slope, vs, raw, dp, delta[:, None], var_dp, scale, softcap, factor, tanh_variance,
                relative, smallest, subnormal, stores_p, A2, SOFTCAP,
            )  # fmt: skip
            p2 = p * p
            by_key = var_ds + p2 * slope * slope * delta_variance[:, None] + (A2 + shared[:, None]) * ds * ds
            by_key_dv = rvar(p, relative, smallest, subnormal) + p2 * (vs + A2 + shared[:, None])
            dk_head += tl.dot(tl.trans(ds), q_wide, input_precision="tf32x3")
            dk_variance += scale * scale * tl.dot(tl.trans(by_key), q2, input_precision="tf32")
            dv_head += tl.dot(tl.trans(p), do_wide, input_precision="tf32x3")
            dv_variance += tl.dot(tl.trans(by_key_dv), do2, input_precision="tf32")
            share = by_key * (scale * scale * tl.sum(q2, 1))[:, None]
            dk_sources += tl.sum(share * share, 0)
            share = by_key_dv * tl.sum(do2, 1)[:, None]
            dv_sources += tl.sum(share * share, 0)
        dk_head = scale * dk_head
        dk_variance += expands * rvar(dk_head, relative, smallest, subnormal)
        dv_variance += expands * rvar(dv_head, relative, smallest, subnormal)
        dk += dk_head
        dv += dv_head
    dk_stored = rvar(dk, relative, smallest, subnormal)
    dv_stored = rvar(dv, relative, smallest, subnormal)
    dk_variance += dk_stored
    dv_variance += dv_stored
    result = (place[:, None] * (heads // group) + kv_head) * D + channel[None, :]
    tl.store(dk_ptr + result, dk, mask=there)
    tl.store(dk_inverse_ptr + result, inverse_deviation(dk_variance), mask=there)
    tl.store(dv_ptr + result, dv, mask=there)
    tl.store(dv_inverse_ptr + result, inverse_deviation(dv_variance), mask=there)
    each = place * (heads // group) + kv_head
    tl.store(dk_degrees_ptr + each, degrees_of(dk_sources, dk_stored, dk_variance, D), mask=key < keys)
    tl.store(dv_degrees_ptr + each, degrees_of(dv_sources, dv_stored, dv_variance, D), mask=key < keys)


@triton.jit
def compare_kernel(
    got_ptr, value_ptr, inverse_ptr, worst_ptr, mean_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The largest deviation of each row of a contiguous ``[rows, columns]`` result, and the mean of their squares."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    column = tl.arange(0, BC)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    got = tl.load(got_ptr + place, mask=there, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + place, mask=there, other=0.0)
    inverse = tl.load(inverse_ptr + place, mask=there, other=0.0)
    z = tl.where(got == value, 0.0, tl.abs(got - value) * inverse)
    # NaN is no number that any budget allows.
    z = tl.where(z == z, z, float("inf"))
    tl.store(worst_ptr + row, tl.max(z, 1), mask=row < rows)
    tl.store(mean_ptr + row, tl.sum(z * z, 1) / columns, mask=row < rows)
