"""What a slice is to draw: values that its backend has had too few of, or those of a case that was nearly wrong."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Final

from attn_fuzz.coverage.allowed import Space
from attn_fuzz.coverage.axes import PLACES, Value, dim_of, group_of, value_channels_of
from attn_fuzz.coverage.counts import Pair
from attn_fuzz.reference.case import Case

AIMABLE: Final = {
    **{"dtype": "dtype", "head_dim": "head_dim", "group": "heads", "mask": "causal", "memory": "memory"},
    "value channels": "values",
}
"""Axes whose values a draw can be asked for, and by which name (``generation.domain.Domain.aim``). Of the others each
value comes up in every few cases, or with the mode and level."""


def pair_of(one: Value, other: Value) -> Pair:
    """Two values in their order."""
    return (one, other) if PLACES[one] <= PLACES[other] else (other, one)


def _raw(space: Space, value: Value) -> tuple[Any, ...]:
    """What a domain calls a value of an axis."""
    axis, name = value
    domain = space.domain
    if axis == "head_dim":
        return tuple(dim for dim in domain.every_head_dim if dim_of(dim) == name)
    if axis == "group":
        return tuple(pair for pair in (*domain.head_groups, *domain.many_heads) if group_of(*pair) == name)
    if axis == "value channels":
        return tuple(pair for pair in domain.value_dims if value_channels_of(*pair) == name)
    return (name == "causal",) if axis == "mask" else (name,)


def aim_at(space: Space, *values: Value) -> dict[str, tuple[Any, ...]]:
    """Values of axes as a domain has them; those that no draw can be asked for are left out."""
    found = {AIMABLE[value[0]]: _raw(space, value) for value in values if value[0] in AIMABLE}
    if ("window", "right") in values or ("window", "both") in values:
        # Causal attention has no such windows.
        found["causal"] = (False,)
    if (pairs := found.get("values")) and (dims := found.pop("head_dim", ())):
        found["values"] = tuple(pair for pair in pairs if pair[0] in dims)
    return {name: raw for name, raw in found.items() if raw}


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
