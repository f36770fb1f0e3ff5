"""A Triton kernel behind values.py: the same integers in 32 bits, one pass over memory instead of thirty.

Unsigned 32-bit products wrap, which is what values.py keeps of its 64-bit ones; the rest is one float64 product and one
sum per element, in the same order, so that the bits are the same (held by a test).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def _mix(bits):
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit(do_not_specialize=["stream"])
def draw_kernel(
    keys_ptr, numbers_ptr, result_ptr, rows, channels, stream, columns,
    HEAD_STRIDE: tl.constexpr, MOST_HEADS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Elements of a contiguous ``[rows, columns]`` tensor, head and channel counted from the column."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    key = tl.load(keys_ptr + row, mask=row < rows, other=0).to(tl.uint32)
    channel = column % channels
    head = column // channels + (channel // HEAD_STRIDE) * MOST_HEADS
    counter = (head * HEAD_STRIDE + channel % HEAD_STRIDE).to(tl.uint32)
    base = _mix(key ^ stream.to(tl.uint32))
    bits = _mix(base[:, None] + (counter * 0x9E3779B1)[None, :])
    second = _mix(bits + 0x632BE59B)
    total = (bits & 0xFFFF) + (bits >> 16) + (second & 0xFFFF) + (second >> 16)
    bell = total.to(tl.int32) - 131070
    # Loaded, not passed: arguments would arrive as float32.
    unit, factor, offset = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    value = bell.to(tl.float64) * unit
    value = value * factor + offset
    place = row[:, None] * columns + column[None, :]
    tl.store(result_ptr + place, value.to(tl.float32).to(result_ptr.dtype.element_ty), mask=there)


@functools.lru_cache(maxsize=32)
def _numbers(unit: float, factor: float, offset: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([unit, factor, offset], dtype=torch.float64, device=device)


def draw(
    keys: torch.Tensor,
    stream: int,
    heads: int,
    channels: int,
    dtype: torch.dtype,
    *,
    head_stride: int,
    most_heads: int,
    unit: float,
    factor: float,
    offset: float,
) -> torch.Tensor:
    """``[rows, heads, channels]`` of ``dtype``: ``(bell * unit) * factor + offset`` of every element's hash.

    Args:
        keys: int64 ``[rows]``, 32-bit numbers.
        stream: 32-bit number of the tensor.
        heads: heads per row.
        channels: channels per head.
        dtype: of the result.
        head_stride: how far apart heads are counted.
        most_heads: so many come before channels beyond that are counted.
        unit: 1 over the standard deviation of the bell.
        factor: a power of two or 3, so that no contraction of product and sum can change a bit.
        offset: with a factor of 3 always 0.
    """
    result = torch.empty(len(keys), heads, channels, dtype=dtype, device=keys.device)
    columns = heads * channels
    block = max(16, min(256, 1 << (columns - 1).bit_length()))
    count = max(1, 1024 // block)
    if len(keys):
        draw_kernel[(-(-len(keys) // count), -(-columns // block))](
            keys,
            _numbers(unit, factor, offset, keys.device),
            result,
            len(keys),
            channels,
            # Arguments are signed.
            stream - (1 << 32) if stream >= 1 << 31 else stream,
            columns,
            HEAD_STRIDE=head_stride,
            MOST_HEADS=most_heads,
            BR=count,
            BC=block,
        )
    return result
