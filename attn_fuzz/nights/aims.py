"""What a slice is to draw: values that its backend has had too few of, or those of a case that was nearly wrong."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from attn_fuzz.coverage.aims import AIMABLE, aim_at, pair_of
from attn_fuzz.coverage.allowed import Space
from attn_fuzz.coverage.axes import Value
from attn_fuzz.coverage.counts import Pair
from attn_fuzz.reference.case import Case


def aim_at_case(case: Case) -> dict[str, tuple[Any, ...]]:
    """The options of a case."""
    return {
        "dtype": (case.dtype,),
        "head_dim": (case.head_dim,),
        "heads": ((case.heads, case.kv_heads),),
        "causal": (case.causal,),
        "memory": (case.memory,),
        **({} if case.head_dim_v is None else {"values": ((case.head_dim, case.head_dim_v),)}),
    }


def rarest(
    space: Space, reached: Mapping[Pair, int], mode: str, level: str, random: Random
) -> dict[str, tuple[Any, ...]]:
    """The value that a backend has had the fewest cases of in a mode and at a level, and one it has had least with it.

    Args:
        space: what the backend takes.
        reached: its cases by pair of values.
        mode: of the slice.
        level: of the slice.
        random: decides between those that are alike.
    """
    here = (("mode", mode), ("level", level))
    values = [value for value in space.values() if value[0] in AIMABLE]
    values = [value for value in values if all(space.why_not(*pair_of(value, place)) is None for place in here)]
    if not values:
        return {}

    def cases(value: Value) -> tuple[int, float]:
        return min(reached.get(pair_of(value, place), 0) for place in here), random.random()

    first = min(values, key=cases)
    others = [value for value in values if value[0] != first[0] and space.why_not(*pair_of(first, value)) is None]
    second = min(others, key=lambda value: (reached.get(pair_of(first, value), 0), random.random()), default=first)
    return aim_at(space, first, second)
