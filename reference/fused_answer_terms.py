"""Terms of the kernels in fused_answer_kernels.py: what budget.py and terms.py have of scores, dS and roundings."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def seen_by(real, key, keys, own, left, right):
    """attention.allowed_keys of a tile: rows that are there, on the keys that they stand on, and keys that are."""
    seen = real[:, None] & (key < keys)[None, :]
    if left >= 0:
        seen = seen & (key[None, :] >= own[:, None] - left)
    if right >= 0:
        seen = seen & (key[None, :] <= own[:, None] + right)
    return seen


@triton.jit
def rvar(x, relative, smallest, subnormal):
    """rounding.rounding_variance."""
    stored = tl.where(tl.abs(x) >= smallest, relative * x * x, subnormal)
    return tl.where(x == 0.0, 0.0, stored)


@triton.jit
def inverse_deviation(variance):
    """1 / standard deviation; inf, so that nothing but the same number passes, where float32 does not hold it."""
    held = (variance >= 1e-30) & (variance <= 1e37)
    return tl.where(held, 1.0 / tl.sqrt(variance), float("inf"))


@triton.jit
def degrees_of(sources, stored, variance, width):
    """budget.degrees_of_freedom of rows; all channels where float32 has no squares of their variances."""
    total = tl.sum(variance, 1)
    concentration = (sources + tl.sum(stored * stored, 1)) / tl.maximum(total * total, 1e-36)
    concentration = tl.minimum(tl.where(total > 1e-15, concentration, 0.0), 1.0)
    return 1.0 / (1.0 / width + concentration)


@triton.jit
def tanh(x):
    # exp overflows to inf and gives the right limit.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def scores_of(q, k, q2, k2, seen, scale, softcap, exp_variance, tanh_variance, A2: tl.constexpr, SOFTCAP: tl.constexpr):
    """(masked scores, slope, score variance with the slope, without it)."""
    # Half precision is exact in TF32.
    s = tl.dot(q, k, input_precision="tf32") * scale
    products = scale * scale * tl.dot(q2, k2, input_precision="tf32")
    raw = A2 * (products + 1.0 + s * s * 0.0625) + exp_variance
    slope = tl.full(s.shape, 1.0, tl.float32)
    vs = raw
    if SOFTCAP:
        t = tanh(s / softcap)
        s = softcap * t
        slope = 1.0 - t * t
        vs = slope * slope * raw + (A2 + tanh_variance) * softcap * softcap * (1.0 - slope)
    return tl.where(seen, s, float("-inf")), slope, vs, raw


@triton.jit
def ds_of(
    p, slope, vs, raw, dp, delta, var_dp, scale, softcap, factor, tanh_variance,
    relative, smallest, subnormal, stores_p, A2: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(dS, its variance)."""
    difference = dp - delta
    p2 = p * p
    ds = p * difference * slope
    per_p2 = vs * difference * difference + var_dp + A2 * (dp * dp + delta * delta)
    variance = rvar(factor * ds, relative, smallest, subnormal) / (factor * factor)
    variance += slope * slope * p2 * per_p2
    variance += stores_p * slope * slope * rvar(p, relative, smallest, subnormal) * difference * difference
    if SOFTCAP:
        bent = 4.0 * (1.0 - slope) * (slope * slope * raw / (softcap * softcap) + (A2 + tanh_variance) * (1.0 - slope))
        variance += p2 * difference * difference * bent
    return ds, variance
