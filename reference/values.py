"""Tensors from counters: integer arithmetic only, so that every machine and device draws the same bits.

An element is a hash of (value seed, tensor name, document name, position in the document, head, channel). Removing,
adding or growing other documents, heads or channels leaves it as it was.
"""

from __future__ import annotations

import functools
import importlib.util
import zlib
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from attn_fuzz.reference import host_values
from attn_fuzz.reference.case import MAX_HEADS, Case
from attn_fuzz.reference.host_values import BLOCK
from attn_fuzz.reference.transfer import transferred

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_MASK = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, torch.Tensor)

# Heads are counted in steps of this, so that a change of head_dim moves no other head's channels. Channels beyond are
# those of further heads, which no case has.
_HEAD_STRIDE = 512


def _mix(bits: _Bits) -> _Bits:
    """A 32-bit finaliser (Wellons' lowbias32), on Python integers and int64 tensors alike.

    int64 products wrap in two's complement on every device, and only their low 32 bits are kept.
    """
    bits = bits & _MASK
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & _MASK
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & _MASK
    return bits ^ (bits >> 16)


def _stream(seed: int, name: str) -> int:
    return _mix(_mix(seed) ^ zlib.crc32(name.encode()))


def _elements(stream: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """One 32-bit hash per (row key, column): int64 ``[len(rows), len(columns)]``."""
    return _mix(_mix(rows ^ stream)[:, None] + columns * 0x9E3779B1)


def _bells(stream: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``_bell`` of ``_elements``: int32 on a CPU, else int64, ``[len(rows), len(columns)]``."""
    if rows.device.type == "cpu":
        return host_values.bell(stream, rows, columns)
    return _bell(_elements(stream, rows, columns))


def _bell(bits: torch.Tensor) -> torch.Tensor:
    """Integers in [-131070, 131070], the sum of four 16-bit uniforms: near enough to a normal, and exact."""
    second = _mix(bits + 0x632BE59B)
    total = (bits & 0xFFFF) + (bits >> 16) + (second & 0xFFFF) + (second >> 16)
    return total - 131070


# Standard deviation of _bell: sqrt(4 * (2**32 - 1) / 12) before centring.
_BELL_SD = ((2**32 - 1) / 3) ** 0.5


@functools.lru_cache(maxsize=8)
def document_rows(ids: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A key per row from its document's name and its position there: int64 ``[sum(lengths)]``; not to be written to."""
    rows = sum(lengths)
    counts, names = transferred([lengths, ids], device)
    names = torch.repeat_interleave(names, counts, output_size=rows)
    begins = torch.repeat_interleave(counts.cumsum(0) - counts, counts, output_size=rows)
    positions = torch.arange(rows, dtype=torch.int64, device=device) - begins
    return _mix(_mix(names * 0x85EBCA6B + 1) + positions)


def columns(heads: int, channels: int, device: torch.device | str) -> torch.Tensor:
    """A counter per (head, channel), channels fastest: int64 ``[heads * channels]``."""
    head = torch.arange(heads, dtype=torch.int64, device=device) * _HEAD_STRIDE
    channel = torch.arange(channels, dtype=torch.int64, device=device)
    if channels > _HEAD_STRIDE:
        channel = channel + channel // _HEAD_STRIDE * (MAX_HEADS - 1) * _HEAD_STRIDE
    return (head[:, None] + channel).flatten()


def _shape_values(mode: str, name: str, bell: torch.Tensor) -> torch.Tensor:
    """Bell integers to float64 in the case's value mode (one multiplication and at most one addition: exact twins)."""
    unit = bell.double() * (1.0 / _BELL_SD)
    if mode == "large" and name in ("q", "k", "x"):
        # Scores with a spread of about 9: softmax rows that are close to one-hot, as trained models have.
        return unit * 3.0
    if mode == "offset" and name in ("k", "v", "x"):
        # A common offset cancels in the softmax and in dP - D: what is left must survive the cancellation.
        return unit * 0.25 + 2.0
    if mode == "ties" and name in ("q", "k"):
        # Few distinct numbers: many scores are equal, and so are the roundings of what comes from them.
        return torch.where(bell < 0, -0.5, 0.5).double()
    if mode == "tiny":
        # 2**-12: squares and gradients reach fp16's subnormals.
        return unit * 2.0**-12
    return unit


_SCALED: Final[dict[str, Callable[[str], tuple[float, float]]]] = {
    "gaussian": lambda name: (1.0, 0.0),
    "large": lambda name: (3.0 if name in ("q", "k", "x") else 1.0, 0.0),
    "offset": lambda name: (0.25, 2.0) if name in ("k", "v", "x") else (1.0, 0.0),
    "tiny": lambda name: (2.0**-12, 0.0),
}
"""(factor, offset) of the modes of ``_shape_values`` that are no more than that."""


def largest_norm(mode: str, name: str, channels: int) -> float:
    """A Euclidean norm that no row of a drawn tensor of that name exceeds, in a value mode.

    ``|x| <= rms (sqrt(channels) + 6)`` but once in 1e8 rows: the norm of normal numbers is as far from the root of
    their count as a normal number is from 0 (Gaussian concentration). No element is beyond 3.47 deviations.
    """
    if mode == "ties" and name in ("q", "k"):
        return 0.5 * channels**0.5
    factor, offset = _SCALED.get(mode, _SCALED["gaussian"])(name)
    largest = factor * 131070 / _BELL_SD + offset
    return min(largest * channels**0.5, (factor**2 + offset**2) ** 0.5 * (channels**0.5 + 6))


@functools.lru_cache(maxsize=16)
def fused_agrees(device: torch.device) -> bool:
    """Whether the fused generator (fused_values.py) runs on a device and gives the portable one's bits there."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    rows = _mix(torch.arange(100, dtype=torch.int64, device=device))
    try:
        return all(
            torch.equal(_fused(rows, "k", mode, 77, 2, dim, dtype), _portable(rows, "k", mode, 77, 2, dim, dtype))
            for mode, dim in (*((mode, 24) for mode in _SCALED), ("gaussian", 576))
            for dtype in DTYPES.values()
        )
    except Exception:
        # A compiler that does not work here: the portable way always does.
        return False


def _fused(
    rows: torch.Tensor, name: str, mode: str, seed: int, heads: int, channels: int, dtype: torch.dtype
) -> torch.Tensor:
    from attn_fuzz.reference import fused_values

    factor, offset = _SCALED[mode](name)
    numbers = {"unit": 1.0 / _BELL_SD, "factor": factor, "offset": offset}
    return fused_values.draw(
        rows,
        _stream(seed, name),
        heads,
        channels,
        dtype,
        head_stride=_HEAD_STRIDE,
        most_heads=MAX_HEADS,
        **numbers,
    )


def _portable(
    rows: torch.Tensor, name: str, mode: str, seed: int, heads: int, channels: int, dtype: torch.dtype
) -> torch.Tensor:
    """Block by block where a processor draws: what it writes over stays in its cache."""
    counters = columns(heads, channels, rows.device)
    made = torch.empty(len(rows), heads, channels, dtype=dtype, device=rows.device)
    size = max(1, BLOCK // max(len(counters), 1)) if rows.device.type == "cpu" else len(rows)
    for some, place in zip(rows.split(size or 1), made.flatten(1).split(size or 1), strict=True):
        place.copy_(_shape_values(mode, name, _bells(_stream(seed, name), some, counters)).float())
    return made


def draw(
    case: Case, name: str, heads: int, channels: int, device: torch.device | str, *, keys: bool = False
) -> torch.Tensor:
    """A token-major tensor of the case, contiguous, in the case's dtype.

    Args:
        case: decides seed, value mode, documents and dtype.
        name: the tensor's name, part of every element's key.
        heads: heads per token.
        channels: channels per head.
        device: where to compute; the bits do not depend on it.
        keys: take the key side of a kernel case's documents rather than the query side.

    Returns:
        ``[tokens, heads, channels]``.
    """
    lengths = case.packed_key_lengths if keys else case.packed_lengths
    device = torch.device(device)
    rows = document_rows(case.packed_ids, lengths, device)
    make = _fused if case.values in _SCALED and fused_agrees(device) else _portable
    return make(rows, name, case.values, case.seed, heads, channels, DTYPES[case.dtype])


def draw_weight(case: Case, name: str, rows: int, channels: int, device: torch.device | str) -> torch.Tensor:
    """A projection ``[rows, channels]`` in the case's dtype, for ``y = x @ weight.T``.

    ``selection`` puts a single power of two, of either sign, in every row: the projection is exact in every dtype.
    """
    stream = _stream(case.seed, name)
    row_keys = _mix(torch.arange(rows, dtype=torch.int64, device=device) + 0x51ED270B)
    if case.weights == "selection":
        bits = _mix(row_keys ^ stream)
        weight = torch.zeros(rows, channels, dtype=torch.float64, device=device)
        sign = 1.0 - 2.0 * ((bits >> 8) & 1).double()
        # Neighbouring rows read neighbouring channels, so no two rows of a narrow head coincide.
        channel = (torch.arange(rows, dtype=torch.int64, device=device) + stream) % channels
        weight[torch.arange(rows, device=device), channel] = sign
    else:
        bell = _bells(stream, row_keys, torch.arange(channels, dtype=torch.int64, device=device))
        weight = bell.double() * (channels**-0.5 / _BELL_SD)
    return weight.float().to(DTYPES[case.dtype])


def draw_norm(case: Case, name: str, device: torch.device | str) -> torch.Tensor:
    """A norm's weight ``[head_dim]`` around 1, in the case's dtype."""
    keys = _mix(torch.arange(case.head_dim, dtype=torch.int64, device=device))
    bell = _bell(_mix(keys ^ _stream(case.seed, name)))
    return (bell.double() * (0.25 / _BELL_SD) + 1.0).float().to(DTYPES[case.dtype])
