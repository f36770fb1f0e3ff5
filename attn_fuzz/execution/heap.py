"""What torch allocates on a CPU, filled by whoever hands the memory out: the C library, or torch's own allocator.

That is below everything that user code may do: its tensor subclasses, modes, transforms and compilers run as ever, and
nothing takes longer. Which of the two fills is tried once, since torch may be built with another allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

import torch

NAN_BYTE: Final = 0xFF
"""NaN in every floating dtype."""

_M_PERTURB: Final = -6
"""glibc's mallopt parameter: memory is handed out filled with the complement of a byte, and is filled when freed."""

_SMALL: Final = (4, 60, 200, 900)
_LARGE: Final = (2_000, 100_000, 3_000_000)
"""Bytes: glibc caches freed blocks of up to a kilobyte."""

T = TypeVar("T")


class _Contexts(Generic[T]):
    """Those that this process is in, of one way to fill, the one that counts last.

    Threads share the allocator: theirs may end in any order, and what is left when all have ended is what was there
    before them.

    Args:
        use: has memory filled as the context says, or with None as before all of them.
    """

    def __init__(self, use: Callable[[T | None], object]) -> None:
        self._use = use
        self._open: list[list[T]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self, how: T) -> Iterator[None]:
        """One more of them."""
        # A list of one thing is itself and no other that is like it.
        entry = [how]
        with self._lock:
            self._open.append(entry)
            self._use(how)
        try:
            yield
        finally:
            with self._lock:
                self._open[:] = [other for other in self._open if other is not entry]
                self._use(self._open[-1][0] if self._open else None)


@functools.cache
def _mallopt() -> Callable[[int, int], int]:
    """The C library's function; elsewhere one that says it cannot."""
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return lambda parameter, value: 0
    return found


def _perturb(byte: int | None) -> bool:
    """Has the C library fill the memory that it hands out with a byte, or with None no longer; False if it cannot."""
    # The complement of 0xFF alone would be 0, which switches it off; glibc keeps more bits than it fills with.
    return bool(_mallopt()(_M_PERTURB, 0 if byte is None else (byte ^ 0xFF) | 0x100))


_perturbing: Final[_Contexts[int]] = _Contexts(lambda byte: _perturb(byte))


def _perturbed(byte: int) -> contextlib.AbstractContextManager[None]:
    """The C library fills."""
    return _perturbing.one(byte)


def _filled(size: int, byte: int) -> bool:
    """Whether memory that was in use before comes filled."""
    zeros = [torch.zeros(size, dtype=torch.uint8, device="cpu") for _ in range(3)]
    del zeros
    return bool((torch.empty(size, dtype=torch.uint8, device="cpu") == byte).all())


@functools.cache
def _library_fills(byte: int, sizes: Sequence[int]) -> bool:
    """Whether what torch allocates on the CPU comes filled by the C library."""
    if not _perturb(None):
        return False
    with _perturbed(byte):
        return all(_filled(size, byte) for size in sizes for _ in range(3))


_FILLS: Final = {"junk": "FLAGS_caffe2_cpu_allocator_do_junk_fill", "zero": "FLAGS_caffe2_cpu_allocator_do_zero_fill"}
"""Variables of torch's CPU allocator. Junk is the bytes ef be ed 7f: NaN as fp32, every other one as bf16 or fp16."""


def _flag(kind: str) -> ctypes.c_bool | None:
    """The allocator's variable, where this torch has it."""
    try:
        # Looked for in all that torch's extension module is linked with.
        return ctypes.c_bool.in_dll(ctypes.CDLL(torch._C.__file__), _FILLS[kind])
    except (OSError, TypeError, ValueError):
        return None


_as_before: dict[str, bool] = {}
"""The allocator's variables before this process was in any of the contexts."""


def _fill_by_allocator(kind: str | None) -> None:
    """Has torch's allocator fill, or with None do what it did before."""
    flags = {name: flag for name in _FILLS if (flag := _flag(name)) is not None}
    if not _as_before:
        _as_before.update({name: flag.value for name, flag in flags.items()})
    wanted = _as_before if kind is None else {name: name == kind for name in flags}
    # Never both: torch refuses to allocate then.
    for name, value in sorted(wanted.items(), key=lambda item: item[1]):
        flags[name].value = value
    if kind is None:
        _as_before.clear()


_allocating: Final[_Contexts[str]] = _Contexts(_fill_by_allocator)


def _allocator_filling(kind: str) -> contextlib.AbstractContextManager[None]:
    """torch's allocator fills, with ``junk`` or ``zero``: any block of any C library, but not with a byte of choice."""
    return _allocating.one(kind)


@functools.cache
def _allocator_fills(kind: str) -> bool:
    """Whether what torch allocates on the CPU comes filled by its allocator."""
    if _flag(kind) is None:
        return False
    with _allocator_filling(kind):
        for size in (1, 50, 500, 50_000):
            ones = torch.ones(size, device="cpu")
            del ones
            found = torch.empty(size, device="cpu")
            if not (found.isnan() if kind == "junk" else found == 0).all():
                return False
    return True


def fills_all(byte: int) -> bool:
    """Whether the C library fills blocks of every size with a byte; small ones it may not, but in child processes."""
    return _library_fills(byte, _SMALL + _LARGE)


def _way(byte: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The best way to fill that works here."""
    if not byte and _allocator_fills("zero"):
        return lambda: _allocator_filling("zero")
    if fills_all(byte):
        return lambda: _perturbed(byte)
    # NaN that is sure to be there, even if every other element of it only, rather than a poison that may be missing.
    if byte == NAN_BYTE and _allocator_fills("junk"):
        return lambda: _allocator_filling("junk")
    if not _library_fills(byte, _LARGE) and _allocator_fills("zero"):
        return lambda: _allocator_filling("zero")
    return lambda: _perturbed(byte)


def filled_heap(byte: int) -> contextlib.AbstractContextManager[None]:
    """A context in which what torch allocates on the CPU comes filled, with a byte where the C library can do that.

    Kernels written in C++ get such memory as Python code does, and so do compiled ones. Where nothing can fill, memory
    holds what it happens to hold.
    """
    # Tried out of sight of what watches the case (batch/batch_size.py).
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        way = _way(byte)
    return way()
