"""Objects with tensors in them, as bytes between processes of one machine.

The pickling that torch brings for processes puts every tensor into shared memory, which costs more than the few
kilobytes of a narrow case and leaves files behind when a process dies.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from typing import Any

import torch


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor:
            return NotImplemented
        x = obj.detach().cpu().contiguous()
        return _tensor, (x.dtype, tuple(x.shape), ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()))


def packed(value: Any) -> bytes:
    """Bytes of anything picklable; tensors arrive on the CPU."""
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def unpacked(data: bytes) -> Any:
    """The inverse of ``packed``."""
    return pickle.loads(data)
