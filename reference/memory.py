"""How tensors lie in memory, with guard margins around them whose bits are compared afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch

MARGIN: Final = 128
"""Guard elements on each side: more than the widest vector access, and a multiple of every alignment in use."""

MIXED: Final = {"q": "head_major", "k": "contiguous", "v": "sliced", "dout": "fused"}
"""How each tensor of a call lies with memory ``mixed``.

Rows of V lie further apart than those of K, and those of the output gradient further than those of Q; heads lie
differently too. Who reads V with the strides of K, or the gradient with those of Q, gets other values, but none from
outside.
"""

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, for comparisons in which NaN equals itself and -0 differs from 0."""
    return x.contiguous().view(_INTEGERS[x.element_size()])


def live_bits(x: torch.Tensor) -> torch.Tensor:
    """``bits`` as a view, for all strides: it follows what is written later."""
    return x.detach().view(_INTEGERS[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@dataclasses.dataclass(frozen=True)
class Placed:
    """A tensor inside a larger allocation of its own."""

    tensor: torch.Tensor
    """The view to hand over."""
    storage: torch.Tensor
    """The whole allocation, flat."""
    before: torch.Tensor
    """Its bits when the tensor was placed."""

    def changed(self) -> str | None:
        """``values`` or ``guard margins`` if their bits are no longer what they were, else None."""
        if torch.equal(bits(self.storage), self.before):
            return None
        return "guard margins" if torch.equal(bits(self.tensor), self._values_before().contiguous()) else "values"

    def _values_before(self) -> torch.Tensor:
        """The tensor's bits when it was placed."""
        return self.before.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())


def all_intact(placed: Sequence[Placed], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()) -> bool:
    """Whether nothing has changed, for which a GPU is waited for once: the answer is nearly always yes.

    Args:
        placed: tensors in their allocations.
        pairs: further tensors as they are and as they were, of the same shapes.
    """
    both = [(bits(each.storage), each.before) for each in placed] + [(bits(now), bits(then)) for now, then in pairs]
    if not any(now.is_cuda for now, _ in both):
        return all(torch.equal(now, then) for now, then in both)
    return not torch.stack([(now != then).any() for now, then in both]).any().item()


def layout_of(name: str, memory: str) -> str:
    """The layout of one tensor (``q``, ``k``, ``v`` or ``dout``) of a case with that memory."""
    return MIXED[name] if memory == "mixed" else memory


def _strides(shape: tuple[int, ...], memory: str) -> tuple[tuple[int, ...], int]:
    """(strides, extent in elements) of a token-major tensor."""
    rows, heads, channels = shape
    match memory:
        case "fused":
            # A slice of [rows, 2 * heads, channels], as the K of a key-value projection is.
            strides = (2 * heads * channels, channels, 1)
        case "head_major":
            strides = (channels, rows * channels, 1)
        case "sliced":
            strides = ((heads + 1) * (channels + 8), channels + 8, 1)
        case "strided":
            # Every other channel of a tensor twice as wide.
            strides = (heads * channels * 2, channels * 2, 2)
        case "contiguous" | "misaligned" | "broadcast":
            strides = (heads * channels, channels, 1)
        case _:
            raise ValueError(f"no tensor by itself has memory layout {memory!r}")
    extent = 1 + sum((max(size, 1) - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return strides, extent


def place(x: torch.Tensor, memory: str, filler: float, shared: int | None = None) -> Placed:
    """Copies a tensor into memory of the given layout, between guard margins.

    Args:
        x: ``[rows, heads, channels]``, or any contiguous shape for ``contiguous`` and ``misaligned``.
        memory: the tensor's layout (``layout_of``).
        filler: what margins and gaps hold; nothing may read them.
        shared: dimension along which ``x`` repeats itself; ``broadcast`` keeps one copy, with stride 0.
    """
    if memory == "broadcast" and shared is not None and x.shape[shared] > 1:
        one = place(x.narrow(shared, 0, 1), "contiguous", filler)
        return Placed(one.tensor.expand(x.shape), one.storage, one.before)
    if x.dim() == 3:
        strides, extent = _strides((x.shape[0], x.shape[1], x.shape[2]), memory)
    else:
        strides, extent = x.contiguous().stride(), x.numel()
    offset = MARGIN + (1 if memory == "misaligned" else 0)
    storage = torch.full((offset + extent + MARGIN,), filler, dtype=x.dtype, device=x.device)
    view = storage.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return Placed(view, storage, bits(storage).clone())
