"""float32 answers and budgets of thousands of half-precision documents, on tensor cores (fused_answer_kernels.py).

Not the oracle, but good enough to say which documents the oracle should look at. float32 arithmetic errs by a
(profile.py) per square root of summed squares, and the budget of a half-precision result holds that very error as its
smallest part: at most a / (0.42 u) standard deviations, 3e-4 in bf16 and 2.3e-3 in fp16, for each such sum on the way.
Variances come from TF32 products of positive numbers, good to 2^-10, and leave out a term (-2 o sum w v) that is small
in half precision. So z is off by hundredths at most; for ``lse``, a float32 result, by about 1.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, Final, NamedTuple

import torch

from attn_fuzz.reference.answer import Inputs
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
from attn_fuzz.reference.values import DTYPES

_SUPPORTED: Final = Profile(stores_probabilities=True, expands_kv=True, normalises_by_lse=True)
_MAX_HEAD_DIM: Final = 128
_LARGEST_TILE: Final = 32
_LEAST_TILE: Final = 16
_SHORT: Final = 64
"""Queries up to which rows come in the least tiles: of documents of 1 to 64 larger ones are half empty, and take a
tenth longer (H200, docs/results.md)."""
_SCALARS: Final = 10
"""Numbers that a kernel is told, one by one."""


class Fused(NamedTuple):
    """One result of a call: float32, token-major, contiguous."""

    value: torch.Tensor
    inverse: torch.Tensor
    """1 / standard deviation, inf where equality is owed, and where float32 does not hold the variance."""
    degrees: torch.Tensor | None = None
    """Independent errors of each row ``[tokens, heads]``; None of ``lse``."""


def unsupported_reason(case: Case, profile: Profile) -> str | None:
    """Why the kernels do not take a case, or None.

    Values around 2^-12 leave float32's range in the fourth power. Profiles that store scores or dP have terms of their
    own. More channels do not fit the registers.
    """
    stated = dataclasses.replace(
        profile, stores_probabilities=True, expands_kv=True, normalises_by_lse=True, exp_error=0.0, tanh_error=0.0
    )
    rules = (
        (importlib.util.find_spec("triton") is not None, "a machine without triton"),
        (case.dtype in ("bf16", "fp16"), f"dtype {case.dtype}"),
        (case.values in ("gaussian", "large", "offset"), f"values {case.values}"),
        (case.head_dim <= _MAX_HEAD_DIM, f"head_dim {case.head_dim}"),
        (case.value_dim == case.head_dim, f"head_dim_v {case.value_dim}"),
        (not case.lse_gradient, "a gradient for the LSE"),
        (stated == _SUPPORTED, "a profile that stores scores, dP or scaled gradients, or has formats of its own"),
        (profile.exp_error <= COARSE, "a profile of coarse exponentials"),
    )
    return next((what for holds, what in rules if not holds), None)


def _power(length: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << (length - 1).bit_length()))


def bytes_of(case: Case) -> int:
    """What an answer takes: a value and an inverse in float32 of each element."""
    rows = case.heads * sum(case.packed_lengths) + case.kv_heads * sum(case.packed_key_lengths)
    return 2 * 2 * 4 * rows * case.head_dim


class Kind(NamedTuple):
    """What the kernels are compiled for: cases of one kind share what was compiled."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    block_m: int
    block_n: int
    softcap: bool

    @classmethod
    def of(cls, case: Case) -> Kind:
        """That of a case."""
        queries, keys = (max(lengths, default=1) for lengths in (case.packed_lengths, case.packed_key_lengths))
        block_m = _LEAST_TILE if queries <= _SHORT else _LARGEST_TILE
        block_n = _power(keys, _LEAST_TILE, _LARGEST_TILE)
        # Heads and channels by the strides that they make, which are compiled for.
        return cls(case.dtype, case.heads, case.kv_heads, case.head_dim, block_m, block_n, bool(case.softcap))

    @property
    def constants(self) -> dict[str, Any]:
        """Of the two kernels of an answer."""
        padded = _power(self.head_dim, _LEAST_TILE, 1 << 30)
        return {
            "BD": padded,
            "EVEN": padded == self.head_dim,
            "BM": self.block_m,
            "BN": self.block_n,
            "A2": ACCUMULATION**2,
            "SOFTCAP": self.softcap,
            # Accumulators of more channels spill out of four warps.
            "num_warps": 8 if self.head_dim > 64 else 4,
            # What is loaded ahead takes registers and shared memory that other programs could use.
            "num_stages": 1,
        }


def _scalars(case: Case, profile: Profile) -> tuple[float, ...]:
    scale, softcap = case.softmax_scale, case.softcap
    return (
        scale,
        softcap or 1.0,
        min(1.0, abs(scale), abs(scale / softcap) if softcap else 1.0),
        profile.exp_error**2,
        profile.tanh_error**2,
        ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[case.dtype] ** 2,
        SMALLEST_NORMAL[case.dtype],
        # Of fp16 only: below float32's range for bf16.
        SUBNORMAL_SPACING[case.dtype] ** 2 / 12 if case.dtype == "fp16" else 0.0,
        float(profile.stores_probabilities),
    )


def fused_answer(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Fused]:
    """Answers and budgets of a kernel case that is supported, by the names of its results.

    Nothing here waits for the device; where the kind was not compiled before, it is now.

    Args:
        case: a kernel case.
        inputs: its tensors, on a GPU.
        profile: the roundings of what ran.
    """
    from attn_fuzz.reference import fused_answer_kernels as kernels

    device = inputs.q.device
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    tokens, heads, dim = q.shape

    def like(x: torch.Tensor) -> Fused:
        shapes = (x.shape, x.shape, x.shape[:2])
        return Fused(*(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes))

    found = {"out": like(q), "lse": like(q[..., 0])._replace(degrees=None), "dq": like(q), "dk": like(k), "dv": like(v)}
    # Each by itself: what begins elsewhere than at multiples of 16 bytes is compiled for anew.
    per_row = tuple(torch.empty(tokens, heads, device=device) for _ in range(3))
    queries, keys = (packed(lengths, device) for lengths in (case.packed_lengths, case.packed_key_lengths))
    documents, kind = len(case.packed_lengths), Kind.of(case)
    places = (q, k, v, dout, queries.bounds, keys.bounds)
    strides = tuple(stride for x in (q, k, v, dout) for stride in x.stride())
    scalars, shapes = _scalars(case, profile), (*case.effective_window, heads, heads // case.kv_heads, dim)
    by_row = [x for name in ("out", "dq", "lse") for x in found[name] if x is not None]
    by_key = [x for name in ("dk", "dv") for x in found[name]]
    kernels.rows_kernel[(documents, heads, -(-queries.longest // kind.block_m))](
        *places, *by_row, *per_row, *strides, *scalars, float(profile.normalises_by_lse), *shapes, **kind.constants
    )
    expands = float(profile.expands_kv and heads > case.kv_heads)
    kernels.keys_kernel[(documents, case.kv_heads, -(-keys.longest // kind.block_n))](
        *places, *by_key, found["lse"].value, *per_row, *strides, *scalars, expands, *shapes, **kind.constants
    )
    return found


def compile_kind(kind: Kind, device: torch.device) -> None:
    """Compiles the kernels for a kind, and launches nothing: a thread of its own may do it.

    Args:
        kind: of cases.
        device: the GPU to compile for, by its number.
    """
    from attn_fuzz.reference import fused_answer_kernels as kernels

    # Of the thread.
    torch.cuda.set_device(device)
    stored, number = DTYPES[kind.dtype], torch.float32
    strides = tuple(
        stride for heads in (kind.heads, kind.kv_heads, kind.kv_heads, kind.heads) for stride in _packed(kind, heads)
    )
    places, scalars = (*(stored,) * 4, *(torch.int32,) * 2), (1.0,) * _SCALARS
    shapes = (-1, 0, kind.heads, kind.heads // kind.kv_heads, kind.head_dim)
    for kernel, outputs in ((kernels.rows_kernel, 11), (kernels.keys_kernel, 10)):
        kernel.warmup(*places, *(number,) * outputs, *strides, *scalars, *shapes, grid=(1,), **kind.constants)


def _packed(kind: Kind, heads: int) -> tuple[int, int, int]:
    """Strides of a packed tensor."""
    return heads * kind.head_dim, kind.head_dim, 1


def rows_of(got: torch.Tensor, found: Fused) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest deviation of each row of a result, and the mean of their squares.

    Args:
        got: ``[tokens, heads, d]``, or ``[tokens, heads]`` of ``lse``.
        found: what it is held to.

    Returns:
        float32 ``[tokens, heads]`` each; inf for NaN, and for other numbers where the inverse is inf.
    """
    from attn_fuzz.reference import fused_answer_kernels as kernels

    got = got.contiguous()
    tokens, heads = got.shape[:2]
    rows, columns = tokens * heads, 1 if got.dim() == 2 else got.shape[2]
    worst, mean = (torch.empty(tokens, heads, dtype=torch.float32, device=got.device) for _ in range(2))
    block = _power(columns, 1, 1 << 30)
    count = max(1, 2048 // block)
    if rows:
        kernels.compare_kernel[(-(-rows // count),)](
            got, found.value, found.inverse, worst, mean, rows, columns, BR=count, BC=block, num_warps=4
        )
    return worst, mean
