"""The K/V buffer that all micro-sequences of a packed sequence share, and its gradient."""

from __future__ import annotations

import torch

from attn_fuzz.reference.memory import layout_of


def key_value_views(
    rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, memory: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unwritten K and V ``[rows, kv_heads, head_dim]`` that lie in memory as a layer would lay them.

    Args:
        rows: capacity.
        kv_heads: K/V heads.
        head_dim: channels per head.
        dtype: storage dtype.
        device: where.
        memory: ``contiguous`` K and V apart; ``fused`` both in one row; ``head_major`` heads outermost; ``sliced``
            rows and heads wider than they are used; ``mixed`` K apart from V, and each as
            it lies in a call; ``strided`` every other channel; ``misaligned`` one element off the allocation's
            alignment.

    Raises:
        ValueError: for an unknown layout.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    shape = (rows, kv_heads, head_dim)
    match memory:
        case "contiguous":
            return empty(*shape), empty(*shape)
        case "fused":
            k, v = empty(rows, 2 * kv_heads, head_dim).chunk(2, 1)
            return k, v
        case "head_major":
            k, v = empty(2 * kv_heads, rows, head_dim).transpose(0, 1).chunk(2, 1)
            return k, v
        case "sliced":
            wide = empty(rows, 2 * kv_heads + 1, head_dim + 8)
            return wide[:, :kv_heads, :head_dim], wide[:, kv_heads : 2 * kv_heads, :head_dim]
        case "mixed":
            k, _ = key_value_views(*shape, dtype, device, layout_of("k", memory))
            _, v = key_value_views(*shape, dtype, device, layout_of("v", memory))
            return k, v
        case "strided":
            wide = empty(rows, 2 * kv_heads, 2 * head_dim)[..., ::2]
            return wide[:, :kv_heads], wide[:, kv_heads:]
        case "misaligned":
            k, v = (empty(rows * kv_heads * head_dim + 1)[1:].view(shape) for _ in range(2))
            return k, v
    raise ValueError(f"unknown memory layout {memory!r}")


def side_by_side(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """K and V ``[rows, kv_heads, head_dim]`` as the ``[rows, 2 * kv_heads, head_dim]`` that they are halves of."""
    apart = v.storage_offset() - k.storage_offset()
    if k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr() or k.stride() != v.stride():
        return None
    if apart != k.shape[1] * k.stride(1):
        return None
    return k.as_strided((k.shape[0], 2 * k.shape[1], k.shape[2]), k.stride())


class KeyValueBuffer:
    """K and V of a packed sequence in the storage dtype, and their gradients in float32.

    Args:
        rows: capacity, at least the packed sequence's tokens.
        kv_heads: K/V heads.
        head_dim: channels per head.
        dtype: storage dtype.
        device: where.
        memory: layout of K and V in memory.
    """

    def __init__(
        self, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, memory: str
    ) -> None:
        self.k, self.v = key_value_views(rows, kv_heads, head_dim, dtype, device, memory)
        self.dk, self.dv = torch.zeros(2, rows, kv_heads, head_dim, dtype=torch.float32, device=device)
        self.frontier = 0

    def claim(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of rows ``[begin, end)``, to be written by the caller; they must be the next ones.

        Raises:
            ValueError: when they are not, or the buffer is full.
        """
        if begin != self.frontier or not begin <= end <= len(self.k):
            raise ValueError(
                f"rows [{begin}, {end}) do not continue a buffer filled to {self.frontier} of {len(self.k)}"
            )
        self.frontier = end
        return self.k[begin:end], self.v[begin:end]

    def write(self, begin: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes rows ``[begin, end)`` in place; they must be the next ones (``claim``)."""
        for rows, new in zip(self.claim(begin, end), (k, v), strict=True):
            rows.copy_(new)

    def read(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of rows ``[begin, end)``, in place.

        Later micro-sequences write other rows of the same memory. ``data`` gives each view its own version counter, so
        that autograd does not mistake those writes for changes to what was saved.
        """
        return self.k.data[begin:end], self.v.data[begin:end]

    def accumulate(self, begin: int, end: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Adds a micro-sequence's gradients over the extent that it attended to."""
        # Not `+=`, which would copy each sum to itself.
        self.dk[begin:end].add_(dk)
        self.dv[begin:end].add_(dv)

    def gradients(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Accumulated gradients of rows ``[begin, end)`` in the storage dtype."""
        return self.dk[begin:end].to(self.k.dtype), self.dv[begin:end].to(self.v.dtype)
