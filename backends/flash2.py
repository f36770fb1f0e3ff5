"""Limits that every build of FlashAttention 2 shares, the one inside torch included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

FLASH2_PROFILE: Final = Profile(expands_kv=True, tanh_error=2.0**-11)
"""Its backward stores dK and dV of every query head and adds up those of a group; softcap goes through the hardware's
tanh."""

ALIGNED_MEMORIES: Final = ("contiguous", "fused", "head_major", "sliced", "mixed")
"""Base pointers off 16-byte alignment end in a misaligned-address fault that takes the CUDA context with it."""

ALIKE_MEMORIES: Final = tuple(memory for memory in ALIGNED_MEMORIES if memory != "mixed")
"""Those in which all tensors of a call lie alike, for backends that plan or compile for every pattern of strides."""


def flash2_limit(case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
    """What FlashAttention 2 gets wrong and its adapters therefore refuse.

    The grouped-heads shortcut for decoding takes every call whose longest document has one query for a decoding batch,
    one query per document, and reshapes q accordingly; empty documents and rows behind the last one break that. And a
    right side of the window that is open beside a bounded left one is closed at ``max_seqlen_k``, too near for rows
    left of the first key; one of at least ``max_seqlen_k`` is dropped, and rows that should see no key see all.
    """
    if any(not any(k for _, k in call) for call in calls):
        # The launch fails with an invalid argument.
        return "calls without a single key"
    left, right = case.effective_window
    for call in calls:
        wide_right = right > 0 and right >= max(k for _, k in call) + case.loose_max_seqlen[1]
        if (wide_right or (left >= 0 and right < 0)) and any(q > k for q, k in call):
            return "windows with no right side, or one as wide as all keys, over documents with more queries than keys"
    if case.heads > case.kv_heads:
        for call in calls:
            if max(q for q, _ in call) + case.loose_max_seqlen[0] == 1 and (
                any(q == 0 for q, _ in call) or case.capacity
            ):
                return "calls of single-query documents with rows that have no document or documents without rows"
    return None
