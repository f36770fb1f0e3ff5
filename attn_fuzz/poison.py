"""Memory that nobody has written yet, filled on purpose.

What a backend leaves unwritten holds whatever the allocator had there: zeros on a lucky day. Every case therefore runs
under two poisons, NaN and a large finite value. Equal bits under both prove that nothing unwritten was read.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

POISONS: Final = ("nan", "finite")

FINITE_BYTE: Final = 0x5A
"""As fp16 203, as bf16 and fp32 1.5e16: conspicuous in each, and no product of two overflows float32."""

NAN_BYTE: Final = 0xFF
"""NaN in every floating dtype."""

# Sizes that together reach into every bin of the CUDA caching allocator that a narrow case uses (512 B to 20 MiB).
_PRIMED: Final = (*((1 << exponent, 8) for exponent in range(9, 20)), (1 << 20, 16), (20 << 20, 2))

_ALLOCATIONS: Final = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)


class _FillAllocations(TorchDispatchMode):
    """Fills what Python code and autograd functions allocate without values."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would wrap the method below, for compilers that never see it, at the cost of a small operator."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and type(result) is torch.Tensor and result.device.type in ("cpu", "cuda"):
            result.untyped_storage().fill_(FINITE_BYTE)  # type: ignore[attr-defined]
        return result


def _prime_cuda(device: torch.device, byte: int = FINITE_BYTE) -> None:
    """Leaves poison in the caching allocator's free blocks, so that kernels' own allocations get it."""
    blocks = [
        torch.empty(size, dtype=torch.uint8, device=device).fill_(byte) for size, count in _PRIMED for _ in range(count)
    ]
    del blocks


@contextlib.contextmanager
def _nan_poison(device: torch.device, *, compiled: bool) -> Iterator[None]:
    if compiled and device.type == "cuda":
        # The mode below would be compiled for apart, and compiled code allocates without its filling.
        _prime_cuda(device, NAN_BYTE)
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        # Operators without a deterministic version say so; that is not what this mode is for.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            memory.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _finite_poison(device: torch.device, *, compiled: bool) -> Iterator[None]:
    if device.type == "cuda":
        _prime_cuda(device)
    # A compiler cannot trace what runs under a dispatch mode; its allocations come from the free blocks.
    with contextlib.nullcontext() if compiled else _FillAllocations():
        yield


@contextlib.contextmanager
def _no_poison() -> Iterator[None]:
    yield


def poisoned(poison: str, device: torch.device, *, compiled: bool = False) -> contextlib.AbstractContextManager[None]:
    """A context in which unwritten memory holds ``nan``, ``finite`` poison, or (``none``) what it happens to hold.

    Args:
        poison: one of those.
        device: where.
        compiled: whether the backend is traced by torch's compiler.

    Raises:
        ValueError: for an unknown poison.
    """
    kinds: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "nan": lambda: _nan_poison(device, compiled=compiled),
        "finite": lambda: _finite_poison(device, compiled=compiled),
        "none": _no_poison,
    }
    if poison not in kinds:
        raise ValueError(f"unknown poison {poison!r}; there are {', '.join(kinds)}")
    return kinds[poison]()


def filler(poison: str) -> float:
    """What guard margins and gaps hold under a poison."""
    return torch.nan if poison == "nan" else 203.0
