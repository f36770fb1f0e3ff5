"""How sums over a document's keys and query rows round, as the profile says that they are taken."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from attn_fuzz.reference.profile import (
    ACCUMULATION,
    ALIKE,
    ATOMIC_TILE,
    PARTIAL_SUM_KEYS,
    ROUNDING_SECOND_MOMENT,
    UNIT_ROUNDOFF,
    Profile,
)

A2: Final = ACCUMULATION**2
"""a^2 of budget.py."""


class Sums(NamedTuple):
    """How sums over a document's keys and query rows round, beyond what a few partial sums do."""

    over_keys: float
    """Squared error of a float32 sum over keys, in units of its terms' squares."""
    over_rows: float
    """The same over query rows."""
    stored: int
    """How often the running sums of dK and dV are stored in the dtype before they are complete."""
    stored_dq: int
    """The same for those of dQ."""
    atomic_dq: int = 0
    """How often the share of a tile is rounded and added to dQ in the dtype, where it is."""
    atomic_dk: int = 0
    """The same for dK, the tiles of all query heads of a group together."""
    atomic_dv: int = 0


_FEW_CHANNELS: Final = 128
"""Of up to so many channels scores are no more than 4 u off alike, which is half of what their LSE may be by itself."""


def cut_off(channels: int) -> float:
    """Squared error of an LSE, in units of its row's mean score, from scores of so many channels; 0 of few.

    Tensor cores add 16 channels at a time and cut off what their sum does not hold, u of it on average: of a sum that
    grows evenly, channels / 32 u, always towards zero, and so alike for scores of one sign. Seen in torch's
    memory-efficient attention at head_dim 488 on an H200, whose LSE was 22 u of the row's mean score off.
    """
    return ALIKE * (channels / 32 * UNIT_ROUNDOFF["fp32"]) ** 2 if channels > _FEW_CHANNELS else 0.0


_SEQUENTIAL = ROUNDING_SECOND_MOMENT / 2 * UNIT_ROUNDOFF["fp32"] ** 2
"""A sum taken term by term rounds as often as it has terms, of partial sums with half its square on average."""


def sums_of(queries: int, keys: int, profile: Profile, group: int = 1) -> Sums:
    """For a call whose longest document has so many queries, and whose longest has so many keys.

    Args:
        queries: rows of the document with most of them.
        keys: the same.
        profile: how the backend computes.
        group: query heads per K/V head.
    """
    stored = stored_dq = 0
    # torch's blocks; a document's first and last are parts of one each.
    if profile.stores_partial_sums and queries > 1:
        stored = math.ceil(queries / (32 if queries < 192 else 64 if queries < 768 else 256))
    if profile.stores_partial_sums and keys > 1:
        stored_dq = math.ceil(keys / PARTIAL_SUM_KEYS)
    # Heads of a group are rows of one sum, unless each has a K/V head of its own.
    rows = queries if profile.expands_kv else group * queries
    key_tiles, row_tiles = math.ceil(keys / ATOMIC_TILE), group * math.ceil(queries / ATOMIC_TILE)
    tiles = {"dq": key_tiles, "dk": row_tiles, "dv": row_tiles}
    return Sums(
        ACCUMULATION**2 + _SEQUENTIAL * keys,
        ACCUMULATION**2 + _SEQUENTIAL * rows,
        stored,
        stored_dq,
        *(count if name in profile.atomic_sums else 0 for name, count in tiles.items()),
    )


def walk_variance(times: int, dtype: str) -> float:
    """What storing a running sum so often makes of it, in units of its terms' squares.

    Partial sums of a random walk that is to end where it does: half-way as large as all of its terms on average.
    """
    return times / 6 * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2


def atomic_variance(times: int, dtype: str) -> float:
    """What adding so many shares in the dtype makes of a sum: each share is rounded, and each running sum.

    In units of the terms' squares, of which every share has its part.
    """
    return (1 + times / 6) * ROUNDING_SECOND_MOMENT * UNIT_ROUNDOFF[dtype] ** 2 if times else 0.0
