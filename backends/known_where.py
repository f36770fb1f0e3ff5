"""Where a known issue is met: on which devices and versions, and by which cases."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import torch

from attn_fuzz.reference.case import Case

Calls = Sequence[Sequence[tuple[int, int]]]
"""For every varlen call that a case makes, (queries, keys) of its documents."""


def on_cuda() -> bool:
    return torch.cuda.is_available()


def with_cudnn_919() -> bool:
    version = torch.backends.cudnn.version()
    return torch.cuda.is_available() and version is not None and 91900 <= version < 92000


def whole_key_tiles(case: Case, calls: Calls) -> bool:
    """The dispatcher takes cuDNN: half precision, head_dim a multiple of 8; and no rest of a tile of 64 keys."""
    half = case.dtype in ("bf16", "fp16") and case.head_dim % 8 == 0
    return half and any((keys := sum(k for _, k in call)) > 0 and keys % 64 == 0 for call in calls)


def masked_whole_key_tiles(case: Case, calls: Calls) -> bool:
    """The same of what takes a mask only for causal documents of other numbers of keys than queries."""
    masked = [call for call in calls if any(q != k for q, k in call)]
    return case.causal and whole_key_tiles(case, masked)


def window_cuts(case: Case, calls: Calls) -> bool:
    """A left bound that hides keys from somebody."""
    left = case.window[0]
    return left >= 0 and any(q > 0 and k > left + 1 for call in calls for q, k in call)


_LONG_SUM: Final = 2048


def long_sums(case: Case, calls: Calls) -> bool:
    """Products for dK and dV are sums over thousands of rows in half precision, whose number is no multiple of 16."""
    group = case.heads // case.kv_heads
    rows = [group * sum(queries for queries, _ in call) for call in calls]
    return case.level == "kernel" and case.dtype != "fp32" and any(n >= _LONG_SUM and n % 16 for n in rows)


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


_TILED: Final = 32
"""Channels that FlashAttention 4's accumulators of gradients are padded to; its kernel on Hopper counts in halves."""


def half_filled(channels: int) -> bool:
    """Up to 128 channels, the last 32 of which are half padding: above, both count in 64."""
    return channels <= 128 and 0 < channels % _TILED <= _TILED // 2


def half_a_tile(case: Case, calls: Calls) -> bool:
    """A head_dim of which that is so."""
    return half_filled(case.head_dim)


@functools.cache
def cublas_drops_the_rest() -> bool:
    """Of a sum over 33,160 rows the last 8 are left out: what is there is seen by itself, whatever its version."""
    if not torch.cuda.is_available():
        return False
    weights = torch.ones(1, 33160, 88, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros(1, 33160, 144, dtype=torch.bfloat16, device="cuda")
    values[:, -8:] = 1.0
    return bool((torch.bmm(weights.transpose(1, 2), values) != 8.0).any())
