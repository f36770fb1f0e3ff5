"""A fast look at thousands of half-precision documents: float32 answers and budgets, on tensor cores (fused.py).

Not the oracle, but good enough to say which documents the oracle should look at. float32 arithmetic errs by a
(profile.py) per square root of summed squares, and the budget of a half-precision result holds that very error as its
smallest part: at most a / (0.42 u) standard deviations, 3e-4 in bf16 and 2.3e-3 in fp16, for each such sum on the way.
Variances come from TF32 products of positive numbers, good to 2^-10, and leave out a term (-2 o sum w v) that is small
in half precision. So z is off by hundredths at most; for ``lse``, a float32 result, by about 1. What looks suspicious
here is judged again in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any, Final

import torch
from attn_fuzz.reference.answer import Inputs, kernel_inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.packed import packed
from attn_fuzz.reference.profile import (
    ACCUMULATION,
    COARSE,
    ROUNDING_SECOND_MOMENT,
    SMALLEST_NORMAL,
    SUBNORMAL_SPACING,
    UNIT_ROUNDOFF,
    Profile,
)

SUSPICIOUS: Final = 0.8
"""Share of the verdict's limit from which on float64 is asked."""

_SUPPORTED: Final = Profile(stores_probabilities=True, expands_kv=True, normalises_by_lse=True)
_MAX_HEAD_DIM: Final = 128


@dataclasses.dataclass(frozen=True)
class Screened:
    """One result of a call: float32, token-major, contiguous."""

    value: torch.Tensor
    inverse: torch.Tensor
    """1 / standard deviation, inf where equality is owed."""


def unsupported_reason(case: Case, profile: Profile, device: torch.device) -> str | None:
    """Why the screen does not take a case, or None.

    Values around 2^-12 leave float32's range in the fourth power. Profiles that store scores or dP have terms of their
    own. More channels do not fit the registers. And before it is used on a device for the first time, it is compared
    with the exact reference there.
    """
    stated = dataclasses.replace(
        profile, stores_probabilities=True, expands_kv=True, normalises_by_lse=True, exp_error=0.0, tanh_error=0.0
    )
    rules = (
        (device.type == "cuda", f"device {device.type}"),
        (importlib.util.find_spec("triton") is not None, "a machine without triton"),
        (case.dtype in ("bf16", "fp16"), f"dtype {case.dtype}"),
        (case.values in ("gaussian", "large", "offset"), f"values {case.values}"),
        (case.head_dim <= _MAX_HEAD_DIM, f"head_dim {case.head_dim}"),
        (stated == _SUPPORTED, "a profile that stores scores, dP or scaled gradients, or has formats of its own"),
        (profile.exp_error <= COARSE, "a profile of coarse exponentials"),
    )
    return next((what for holds, what in rules if not holds), None) or distrust(device)


@functools.lru_cache(maxsize=16)
def distrust(device: torch.device) -> str | None:
    """Why the screen is not used on a device: it does not run there, or disagrees with the exact reference; or None."""
    case = Case(
        level="kernel",
        lengths=(3, 37, 0, 5, 64, 1),
        key_lengths=(7, 70, 4, 0, 128, 1),
        heads=4,
        kv_heads=2,
        head_dim=64,
        dtype="bf16",
    )
    inputs = kernel_inputs(case, device)
    exact = kernel_answer(case, inputs, Profile())
    try:
        screened = screen(case, inputs, Profile())
    except Exception as error:
        return f"a compiler that works: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    for name, expected in exact.items():
        owed = expected.variance == 0
        value, ratio = screened[name].value.double(), screened[name].inverse.double() * expected.variance.sqrt()
        z = (value - expected.value).abs() / expected.variance.sqrt()
        # Equal infinities: the LSE of rows that see no key.
        z = torch.where(value == expected.value, 0.0, z)[~owed]
        if not torch.equal(value[owed], expected.value[owed]) or not z.max() < (2.0 if name == "lse" else 0.1):
            return f"agreement with the exact reference: {name} is off by {z.max().item():.2g} standard deviations"
        if not (ratio[~owed] - 1).abs().max() < 0.02:
            return f"agreement with the exact reference: the budget of {name} is off"
    return None


def _power(length: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << (length - 1).bit_length()))


def screen(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Screened]:
    """Answers and budgets of a kernel case that ``takes`` takes, by the names of its results.

    Nothing here waits for the device.
    """
    from attn_fuzz.reference import fused

    device = inputs.q.device
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    tokens, heads, dim = q.shape

    def like(x: torch.Tensor) -> Screened:
        return Screened(*(torch.empty(x.shape, dtype=torch.float32, device=device) for _ in range(2)))

    found = {"out": like(q), "lse": like(q[..., 0]), "dq": like(q), "dk": like(k), "dv": like(v)}
    delta, delta_variance, shared = torch.empty(3, tokens, heads, device=device).unbind()
    queries, keys = (packed(lengths, device) for lengths in (case.packed_lengths, case.packed_key_lengths))
    documents = len(case.packed_lengths)
    left, right = case.effective_window
    block_m, block_n = _power(queries.longest, 16, 32), _power(keys.longest, 16, 32)
    scale = case.softmax_scale
    cap = case.softcap or 1.0
    inputs_and_places = (q, k, v, dout, queries.bounds, keys.bounds)
    strides = tuple(stride for x in (q, k, v, dout) for stride in x.stride())
    factor = min(1.0, abs(scale), abs(scale / case.softcap) if case.softcap else 1.0)
    stores = (
        ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[case.dtype] ** 2,
        SMALLEST_NORMAL[case.dtype],
        # Of fp16 only: below float32's range for bf16.
        SUBNORMAL_SPACING[case.dtype] ** 2 / 12 if case.dtype == "fp16" else 0.0,
        float(profile.stores_probabilities),
    )
    scalars = (scale, cap, factor, profile.exp_error**2, profile.tanh_error**2, *stores)
    shapes = (left, right, heads, heads // case.kv_heads, dim)
    # What is compiled for is kept to a few kinds: whoever draws options would wait for each of them once.
    padded = _power(dim, 16, 1 << 30)
    constants: dict[str, Any] = {
        "BD": padded,
        "EVEN": padded == dim,
        "BM": block_m,
        "BN": block_n,
        "A2": ACCUMULATION**2,
        "SOFTCAP": bool(case.softcap),
        # Accumulators of more channels spill out of four warps.
        "num_warps": 8 if dim > 64 else 4,
    }
    per_row = (delta, delta_variance, shared)
    by_row = [x for name in ("out", "dq", "lse") for x in (found[name].value, found[name].inverse)]
    by_key = [x for name in ("dk", "dv") for x in (found[name].value, found[name].inverse)]
    fused.rows_kernel[(documents, heads, -(-queries.longest // block_m))](
        *inputs_and_places,
        *by_row,
        *per_row,
        *strides,
        *scalars,
        float(profile.normalises_by_lse),
        *shapes,
        **constants,
    )
    fused.keys_kernel[(documents, case.kv_heads, -(-keys.longest // block_n))](
        *inputs_and_places,
        *by_key,
        found["lse"].value,
        *per_row,
        *strides,
        *scalars,
        float(profile.expands_kv and heads > case.kv_heads),
        *shapes,
        **constants,
    )
    return found


def row_maxima(got: torch.Tensor, screened: Screened) -> torch.Tensor:
    """The largest deviation of each row of a result: float32 ``[tokens]``; inf for NaN and where equality was owed."""
    from attn_fuzz.reference import fused

    got = got.contiguous()
    rows, columns = len(got), got[:1].numel()
    worst = torch.empty(rows, dtype=torch.float32, device=got.device)
    block = _power(columns, 16, 1024)
    count = max(1, 2048 // block)
    if rows:
        fused.compare_kernel[(-(-rows // count),)](
            got, screened.value, screened.inverse, worst, rows, columns, BR=count, BC=block, num_warps=4
        )
    return worst
