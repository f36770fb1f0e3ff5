"""Tensors of a few rows whose elements lie more than 2^31 apart: what counts offsets in 32 bits finds none of them.

All of a call lie in one allocation, side by side, in stripes that are as far apart as it takes. Of a CPU's memory only
the pages with something in them are ever there.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Mapping
from typing import Final

import torch

from attn_fuzz.reference.memory import MARGIN, Placed, bits

FAR: Final = 1 << 31
"""Elements: the first offset that a signed 32-bit number does not hold."""

_SPAN: Final = 3 * FAR // 2
"""Elements from the first row or head to the last: a third of them are beyond."""

_MOST: Final = {"cpu": 16 * FAR, "cuda": 2 * FAR}
"""Elements that an allocation spans, by kind of device; on a CPU most are never there."""

_ALIGNED: Final = 64
"""Stripes begin at multiples of so many elements: 128 bytes of half precision."""

_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)

Shape = tuple[int, int, int]
"""Rows, heads, channels."""


@dataclasses.dataclass(frozen=True)
class FarPlaced(Placed):
    """A tensor in stripes, each between guard margins, which ``storage`` has with it: ``[stripes, elements]``."""

    memory: str = "far_rows"

    def _values_before(self) -> torch.Tensor:
        rows, heads, channels = self.tensor.shape
        inside = self.before[:, MARGIN:-MARGIN]
        if self.memory == "far_heads":
            return inside.reshape(heads, rows, channels).transpose(0, 1)
        return inside.reshape(rows, heads, channels)


def _striped(memory: str, shape: Shape) -> tuple[int, int]:
    """(stripes, elements of each) of a tensor: its rows, its heads, or all of it."""
    rows, heads, channels = shape
    match memory:
        case "far_rows":
            return rows, heads * channels
        case "far_heads":
            return heads, rows * channels
        case "far_base":
            return 1, rows * heads * channels
        case _:
            raise ValueError(f"{memory!r} is no layout of rows far apart")


def _up(number: int) -> int:
    return -(-number // _ALIGNED) * _ALIGNED


class FarMemory:
    """Room for all tensors of a call.

    Args:
        memory: ``far_rows`` or ``far_heads``: rows or heads are so far apart that the last one is beyond 2^31 elements;
            where there is but one of them, or with ``far_base``, all begins there.
        shapes: of the tensors, by name.
        dtype: of all of them.
        device: where.

    Raises:
        OSError: where a CPU has no room for it.
        torch.OutOfMemoryError: where a GPU has none.
    """

    def __init__(self, memory: str, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device) -> None:
        self.memory, self._shapes, self._offsets = memory, shapes, dict[str, int]()
        width = 0
        for name, shape in shapes.items():
            self._offsets[name] = width + MARGIN
            width += _up(_striped(memory, shape)[1]) + 2 * MARGIN
        counts = [max(_striped(memory, shape)[0] - 1, 1) for shape in shapes.values()]
        most = max(_striped(memory, shape)[0] for shape in shapes.values()) - 1
        self._base = 0 if most > 0 else FAR
        # Where there are fewer keys than queries, or the other way round, the last of those should be far, too.
        steps = [_up(max(width, math.ceil(_SPAN / count))) for count in (min(counts), max(counts))]
        self._step = next((step for step in steps if most * step <= _MOST[device.type]), steps[-1])
        self._room = _room(self._base + max(most, 0) * self._step + width, dtype, device)

    def place(self, name: str, x: torch.Tensor, filler: float) -> Placed:
        """Copies a tensor of that name into its stripes; ``filler`` is what margins around them hold."""
        rows, heads, channels = self._shapes[name]
        stripes, length = _striped(self.memory, self._shapes[name])
        offset = self._base + self._offsets[name]
        windows = self._room.as_strided((stripes, length + 2 * MARGIN), (self._step, 1), offset - MARGIN)
        windows.fill_(filler)
        strides = {
            "far_rows": (self._step, channels, 1),
            "far_heads": (channels, self._step, 1),
            "far_base": (heads * channels, channels, 1),
        }[self.memory]
        view = self._room.as_strided((rows, heads, channels), strides, offset)
        view.copy_(x)
        return FarPlaced(view, windows, bits(windows).clone(), self.memory)


def _room(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that nothing has been written to: on a CPU it is made page by page, where something is."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(elements, dtype=dtype, device=device)
    # Shared, so that no limit on a process's data counts what is never there.
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
