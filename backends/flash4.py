"""Channels that FlashAttention 4's backward on Hopper does not take, as far as its own checks let them through.

Tiles and stages are those of ``_tile_size_bwd_sm90`` and ``FlashAttentionBackwardSm90`` in flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from attn_fuzz.backends.known_where import half_filled
from attn_fuzz.reference.case import Case

_ODD_TILES: Final = (104, 112)
"""Head dimensions between 96 and 128 that it rounds to 112."""

_SWAPPED: Final = 128
"""Above, dK and dV have their channels where others have rows, and channels are counted in 64 instead of 16."""

_MOST_SHARED: Final = 232448
"""Bytes of shared memory that a block may have on Hopper."""

_ALIGNED: Final = 1024


class _Tiles(NamedTuple):
    """Rows of a tile of queries and of one of keys, and how many of each there are in shared memory."""

    queries: int
    keys: int
    stages_q: int
    stages_do: int
    products: int
    """Tiles of P and dS together."""


def _tiles(head_dim: int, head_dim_v: int, *, masked: bool) -> _Tiles:
    if head_dim <= 64:
        return _Tiles(128, 128, 2, 2, 2)
    if head_dim <= 96:
        return _Tiles(64, 128, 2, 2, 2)
    if head_dim <= _SWAPPED:
        return _Tiles(64 if masked else 80, 128, 2, 2, 2)
    if head_dim <= 192:
        return _Tiles(64, 96, 2, 2 if head_dim_v <= _SWAPPED else 1, 2)
    return _Tiles(64, 48, 2, 1, 2)


def _counted(channels: int, head_dim: int) -> int:
    """Channels as the kernel counts them: rounded up."""
    unit = 64 if head_dim > _SWAPPED else 16
    return -(-channels // unit) * unit


def shared_bytes(head_dim: int, head_dim_v: int, *, masked: bool = True) -> int:
    """Shared memory that the backward asks for: Q, dO, K, V, products, dQ, and the LSE and D of each stage.

    Args:
        head_dim: of queries and keys.
        head_dim_v: of values.
        masked: whether attention is causal or has a window.
    """
    tiles = _tiles(head_dim, head_dim_v, masked=masked)
    keys, values = (_counted(dim, head_dim) for dim in (head_dim, head_dim_v))
    rows = 2 * tiles.queries * (tiles.stages_q * keys + tiles.stages_do * values)
    columns = 2 * tiles.keys * (keys + values)
    products = 2 * tiles.queries * tiles.keys * tiles.products
    sums = 4 * tiles.queries * (keys + tiles.stages_q + tiles.stages_do)
    return rows + columns + products + sums + _ALIGNED


def takes_values(head_dim: int, head_dim_v: int, *, masked: bool = True) -> bool:
    """Whether it takes values of another number of channels than queries and keys; arguments as of ``shared_bytes``."""
    if head_dim <= _SWAPPED:
        # dO is laid out with the swizzle of as many channels as a key has, which has to go into those of a value.
        swizzle = next(width for width in (64, 32, 16) if _counted(head_dim, head_dim) % width == 0)
        if _counted(head_dim_v, head_dim) % swizzle or half_filled(head_dim) or half_filled(head_dim_v):
            return False
    return shared_bytes(head_dim, head_dim_v, masked=masked) <= _MOST_SHARED


VALUE_DIMS: Final = tuple(
    (dim, other) for dim in range(8, 257, 8) for other in range(8, 257, 8) if dim != other and takes_values(dim, other)
)
"""(head_dim, head_dim_v) that its backward takes with a mask. Its own check takes all from 8 to 256."""


def flash4_limit(case: Case) -> str | None:
    """What about a case's channels the backward does not take without a mask, or None."""
    if case.causal or max(case.window) >= 0:
        return None
    # Tiles have 80 rows there, of which no backward of 112 channels is compiled.
    if _ODD_TILES[0] <= case.head_dim <= _ODD_TILES[1]:
        return f"{_ODD_TILES[0]} to {_ODD_TILES[1]} channels with neither a causal mask nor a window"
    if case.head_dim_v is not None and not takes_values(case.head_dim, case.head_dim_v, masked=False):
        return f"{case.head_dim_v} channels beside {case.head_dim} with neither a causal mask nor a window"
    return None
