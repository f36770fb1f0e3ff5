"""Memory that nobody has written yet, filled on purpose.

What a backend leaves unwritten holds whatever the allocator had there: zeros on a lucky day. Every case therefore runs
under two poisons, NaN and a large finite value. Equal bits under both prove that nothing unwritten was read.

Memory is filled where it is handed out, below Python code, torch's modes and its compilers: what user code may do, and
which kernels torch chooses for it, is the same as without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from attn_fuzz.execution.allocations import filled_allocations
from attn_fuzz.execution.heap import NAN_BYTE, filled_heap

POISONS: Final = ("nan", "finite")

FINITE_BYTE: Final = 0x5A
"""As fp16 203, as bf16 and fp32 1.5e16: conspicuous in each, and no product of two overflows float32."""

_BYTES: Final = {"nan": NAN_BYTE, "finite": FINITE_BYTE, "zero": 0}
"""Zeros are no poison: they tell what the contents of unwritten memory did from what arithmetic did."""


def _blocks(times: int, longest: int) -> tuple[int, ...]:
    """Sizes that together reach into every bin of the CUDA caching allocator for what is small (512 B to 1 MiB)."""
    return (*(1 << exponent for exponent in range(9, 20) for _ in range(times)), *(1 << 20 for _ in range(longest)))


# The largest ones are for the bin of what is larger, 20 MiB.
_PRIMED: Final = (*_blocks(8, 16), 20 << 20, 20 << 20)
_PRIMED_AGAIN: Final = _blocks(2, 4)


def _prime(sizes: Sequence[int], byte: int, device: torch.device) -> None:
    """Leaves poison in the caching allocator's free blocks, so that kernels' own allocations get it; a few launches."""
    blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    torch._foreach_zero_(blocks)
    if byte:
        torch._foreach_add_(blocks, byte)


def prime_again(poison: str, device: torch.device) -> None:
    """Fills a GPU's free blocks anew, before one of many calls that get their memory from there: fewer of them, since
    the smallest block that fits is what is given."""
    if device.type == "cuda" and poison in _BYTES:
        _prime(_PRIMED_AGAIN, _BYTES[poison], device)


@contextlib.contextmanager
def _filled_device(byte: int, device: torch.device, *, free_blocks: bool) -> Iterator[None]:
    _prime(_PRIMED, byte, device)
    with contextlib.nullcontext() if free_blocks else filled_allocations(byte, device):
        yield


def poisoned(
    poison: str, device: torch.device, *, free_blocks: bool = False
) -> contextlib.AbstractContextManager[None]:
    """A context in which unwritten memory holds ``nan``, ``finite`` poison, ``zero``, or (``none``) what it happens to.

    Args:
        poison: one of those.
        device: where.
        free_blocks: whether on a GPU the free blocks alone are filled, and not every allocation: code that torch
            compiles allocates past the dispatcher, and filling takes longer than allocating.

    Raises:
        ValueError: for an unknown poison.
    """
    if poison == "none":
        return contextlib.nullcontext()
    if poison not in _BYTES:
        raise ValueError(f"unknown poison {poison!r}; there are {', '.join(_BYTES)}, none")
    byte = _BYTES[poison]
    filled = _filled_device(byte, device, free_blocks=free_blocks) if device.type == "cuda" else filled_heap(byte)
    return _not_by_torch(filled) if torch.are_deterministic_algorithms_enabled() else filled


@contextlib.contextmanager
def _not_by_torch(filled: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """Memory holds the poison also where torch's deterministic algorithms are on, which fill it with NaN themselves."""
    flags: Any = torch.utils.deterministic
    before = flags.fill_uninitialized_memory
    flags.fill_uninitialized_memory = False
    try:
        with filled:
            yield
    finally:
        flags.fill_uninitialized_memory = before


def filler(poison: str) -> float:
    """What guard margins and gaps hold under a poison."""
    return {"nan": torch.nan, "zero": 0.0}.get(poison, 203.0)


_OTHER_NUMBER: Final = -77.0
"""Of another sign and size than the finite poison, so that results tell what it did."""


def finite_filler(poison: str) -> float:
    """The same where it has to be a number: another one under each poison."""
    return _OTHER_NUMBER if poison == "nan" else filler(poison)
