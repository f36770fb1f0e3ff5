"""What torch allocates on a GPU, filled by kernels that stand before torch's own.

They lie below torch's modes, subclasses, transforms and compilers, none of which sees them. Of what user code may do,
only one thing is known not to work above them: a tensor that comes out of Python cannot become a subclass in place, as
``Subclass(2, 3)`` makes one, which is always on the CPU (heap.py) unless somebody changes torch's default tensor type.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATIONS: Final = ("empty.memory_format", "empty_strided")
"""What all others call, in Python and in C++."""

_BOOL: Final = {0xFF: 1}
"""What booleans are filled with for a byte, else 0: any other value of one is undefined behaviour in C++."""

_OVERRIDE: Final[dict[str, Any]] = (
    {"allow_override": True} if "allow_override" in inspect.signature(torch.library.Library.impl).parameters else {}
)
"""Says that a kernel is meant to be overridden, to versions of torch that can be told."""


@functools.cache
def _own_kernels(key: str) -> tuple[Any, ...]:
    """torch's own kernels of the two allocations; asked for before anything stands before them."""
    return tuple(torch.library.get_kernel(f"aten::{name}", key) for name in _ALLOCATIONS)


@functools.cache
def _memset() -> Any:
    """The driver's ``cuMemsetD8Async``: address, byte, bytes, stream; None where it is not to be had."""
    try:
        found: Any = ctypes.CDLL("libcuda.so.1").cuMemsetD8Async
    except (AttributeError, OSError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p)
    found.restype = ctypes.c_int
    return found


def _fill(storage: Any, byte: int, index: int) -> None:
    """Fills a storage, of a GPU on its current stream: by one call of the driver's where that GPU is the current one.

    Args:
        storage: a ``torch.UntypedStorage``.
        byte: what with.
        index: of the GPU; -1 for a CPU.
    """
    memset = _memset()
    if memset is not None and index >= 0 and index == torch._C._cuda_getDevice():
        stream = torch._C._cuda_getCurrentRawStream(index)
        if not memset(storage.data_ptr(), byte, storage.nbytes(), stream):
            return
    storage.fill_(byte)


def _filling(own: Any, byte: int) -> Callable[..., torch.Tensor]:
    """The same allocation, filled, on the stream that it is made for and without waiting for it."""

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        allocated = own.call_boxed(keys, *args, **kwargs)
        storage = allocated.untyped_storage()
        # Filling may allocate, in its turn, a tensor that has no bytes.
        if storage.nbytes():
            _fill(storage, _BOOL.get(byte, 0) if allocated.dtype == torch.bool else byte, allocated.get_device())
        return allocated

    return kernel


@contextlib.contextmanager
def _filled(byte: int, key: str, *, quietly: bool) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    try:
        # torch warns of an overridden kernel, once; a filter set every time would have others' warnings come again.
        with warnings.catch_warnings() if quietly else contextlib.nullcontext():
            if quietly:
                warnings.simplefilter("ignore")
            for name, own in zip(_ALLOCATIONS, _own_kernels(key), strict=True):
                library.impl(name, _filling(own, byte), key, with_keyset=True, **_OVERRIDE)
        yield
    finally:
        library._destroy()


class _Subclass(torch.Tensor):
    """As frameworks make parameters of."""


class _Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Overriding(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _works(device: torch.device, byte: int) -> bool:
    """Whether allocations come out filled, and user code can do what it can do without that."""
    like = torch.zeros(3, 5, device=device)
    made = [
        torch.empty(3, 5, device=device),
        torch.empty_like(like),
        torch.empty_strided((3, 5), (8, 1), device=device),
        like.new_empty(7),
    ]
    torch.Tensor.__new__(_Subclass, torch.empty_like(like))
    torch.nn.Parameter(torch.Tensor._make_subclass(_Subclass, torch.empty_like(like)))
    with _Passing():
        made.append(torch.empty_like(like) * 1.0)
    with _Overriding():
        made.append(torch.empty_like(like))
    torch.vmap(lambda row: torch.empty_like(row).copy_(row))(like)
    with torch.inference_mode():
        made.append(torch.empty_like(like))
    torch.empty(0, device=device)
    return all(bool((x.cpu().contiguous().view(torch.uint8) == byte).all()) for x in made) and not like.any()


@functools.cache
def can_be_filled(device: torch.device) -> bool:
    """Whether kernels can stand before torch's on a device: tried, before anybody is accused of what they break."""
    byte = 0x5A
    try:
        with _filled(byte, device.type.upper(), quietly=True):
            return _works(device, byte)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


@contextlib.contextmanager
def filled_allocations(byte: int, device: torch.device) -> Iterator[None]:
    """A context in which what torch allocates on a kind of device comes filled; nothing is done where it cannot."""
    if not can_be_filled(device):
        yield
        return
    with _filled(byte, device.type.upper(), quietly=torch.is_warn_always_enabled()):
        yield
