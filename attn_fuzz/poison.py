"""Memory that nobody has written yet, filled on purpose.

What a backend leaves unwritten holds whatever the allocator had there: zeros on a lucky day. Every case therefore runs
under two poisons, NaN and a large finite value. Equal bits under both prove that nothing unwritten was read.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
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

_M_PERTURB: Final = -6
"""glibc's mallopt parameter: memory is handed out filled with the complement of a byte, and is filled when freed."""

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


def _perturb(byte: int) -> bool:
    """Has the C library fill the memory that it hands out with a byte, or with 0 no longer; False where it cannot."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_PERTURB, byte ^ 0xFF if byte else 0))


@functools.cache
def _heap_fills() -> bool:
    """Whether what torch allocates on the CPU comes filled by the C library: tried, since it may allocate otherwise."""
    # Below a kilobyte a cache of free blocks may now and then hand one out as it is.
    sizes = (2_000, 100_000, 3_000_000)
    if not _perturb(FINITE_BYTE):
        return False
    try:
        zeros = [torch.zeros(size, dtype=torch.uint8) for size in sizes for _ in range(2)]
        del zeros
        return all(bool((torch.empty(size, dtype=torch.uint8) == FINITE_BYTE).all()) for size in sizes)
    finally:
        _perturb(0)


_ALLOCATORS: Final = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
"""How Python code asks for unwritten memory."""


def _filling(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """The same allocation, filled."""

    @functools.wraps(allocate)
    def filled(*args: Any, **kwargs: Any) -> Any:
        result = allocate(*args, **kwargs)
        if type(result) is torch.Tensor and result.device.type == "cpu" and kwargs.get("out") is None:
            storage = result.untyped_storage()
            ctypes.memset(storage.data_ptr(), FINITE_BYTE, storage.nbytes())
        return result

    return filled


@contextlib.contextmanager
def _filled_heap() -> Iterator[None]:
    """Fills what is allocated, by kernels written in C++ too, and does nothing about any other operation.

    The C library fills all blocks but a few small ones; those that Python code asks for are filled here for certain.
    """
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, memory, "fill_uninitialized_memory", fill)
        undo.callback(_perturb, 0)
        _perturb(FINITE_BYTE)
        for owner, name in _ALLOCATORS:
            own, allocate = name in vars(owner), getattr(owner, name)
            undo.callback(*((setattr, owner, name, allocate) if own else (delattr, owner, name)))
            setattr(owner, name, _filling(allocate))
        yield


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
    if compiled:
        yield
        return
    # A dispatch mode would double the time of a narrow layer's small operations.
    with _filled_heap() if device.type == "cpu" and _heap_fills() else _FillAllocations():
        yield


@contextlib.contextmanager
def _zero_poison(device: torch.device) -> Iterator[None]:
    """TEMPORARY until the other branch is merged."""
    global FINITE_BYTE
    before, FINITE_BYTE = FINITE_BYTE, 0
    try:
        with _FillAllocations():
            yield
    finally:
        FINITE_BYTE = before


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
        "zero": lambda: _zero_poison(device),
        "none": _no_poison,
    }
    if poison not in kinds:
        raise ValueError(f"unknown poison {poison!r}; there are {', '.join(kinds)}")
    return kinds[poison]()


def filler(poison: str) -> float:
    """What guard margins and gaps hold under a poison."""
    return {"nan": torch.nan, "zero": 0.0}.get(poison, 203.0)
