"""Values of axes that draws can be asked for: what a domain calls them, and where all of them may occur."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from attn_fuzz.coverage.allowed import Space
from attn_fuzz.coverage.axes import AXES, GAPS, PLACES, Value, dim_of, group_of, value_channels_of
from attn_fuzz.coverage.counts import Pair
from attn_fuzz.generation.layouts import takes_few_keys

AIMABLE: Final = {
    **{"dtype": "dtype", "head_dim": "head_dim", "group": "heads", "mask": "causal", "memory": "memory"},
    "value channels": "values",
}
"""Axes whose values a slice of a night is asked for, and by which name (``generation.domain.Domain.aim``). Of the
others each value comes up in every few cases, or with the mode and level."""

ALL_AIMABLE: Final = {
    **AIMABLE,
    **{"window": "window", "softcap": "softcap", "LSE gradient": "lse_gradient", "max_seqlen": "max_seqlen"},
    **{"gaps": "gaps", "queries": "long_rows"},
}
"""All axes whose values draws can be asked for."""

_LONG: Final = "256-"
"""Queries of a document: the class that calls can be asked for, as one document of thousands."""

AIMS: Final[dict[str, tuple[str, ...]]] = {
    axis.name: (_LONG,) if axis.name == "queries" else axis.values for axis in AXES if axis.name in ALL_AIMABLE
}
"""Which values of each axis draws can be asked for."""

_SIDES: Final = {name: sides for sides, name in GAPS.items()}


def pair_of(one: Value, other: Value) -> Pair:
    """Two values in their order."""
    return (one, other) if PLACES[one] <= PLACES[other] else (other, one)


def _raw(space: Space, value: Value) -> tuple[Any, ...]:
    """What a domain calls a value of an axis."""
    axis, name = value
    domain = space.domain
    match axis:
        case "head_dim":
            return tuple(dim for dim in domain.every_head_dim if dim_of(dim) == name)
        case "group":
            return tuple(pair for pair in (*domain.head_groups, *domain.many_heads) if group_of(*pair) == name)
        case "value channels" if name == "same":
            return (None,)
        case "value channels":
            return tuple(pair for pair in domain.value_dims if value_channels_of(*pair) == name)
        case "gaps":
            return (_SIDES[name],)
        case "mask" | "softcap" | "LSE gradient" | "max_seqlen" | "queries":
            return (name in ("causal", "on", "loose", _LONG),)
    return (name,)


def _masks(space: Space, values: Sequence[Value], axes: Mapping[str, str]) -> tuple[bool, ...]:
    """Whether attention is causal, where values say so or others of them need it; empty where they leave it open."""
    masks = [name for axis, name in values if axis == "mask"]
    windows = [value for value in values if value[0] == "window"]
    # What has fewer keys than queries sees none in some rows, if it is causal.
    few = "queries" in axes and ("queries", _LONG) in values
    if not (masks or windows or few):
        return ()
    found = tuple(
        mask == "causal"
        for mask in ("causal", "full")
        if mask in masks or not masks
        if not windows or any(space.why_never(("mask", mask), window) is None for window in windows)
        if not few or takes_few_keys(space.capabilities, causal=mask == "causal")
    )
    return found if masks or len(found) == 1 else ()


def aim_at(space: Space, *values: Value, axes: Mapping[str, str] = AIMABLE) -> dict[str, tuple[Any, ...]]:
    """Values of axes as a domain has them; those that no draw can be asked for are left out.

    Args:
        space: what the backend takes.
        values: what draws are to have; of several of one axis any.
        axes: those that are aimed at.
    """
    found = dict[str, tuple[Any, ...]]()
    for axis, name in values:
        if axis in axes and axis != "mask":
            found[axes[axis]] = (*found.get(axes[axis], ()), *_raw(space, (axis, name)))
    found["causal"] = _masks(space, values, axes)
    if (pairs := found.get("values")) and (dims := found.get("head_dim")):
        differ = tuple(pair for pair in pairs if pair is not None and pair[0] in dims)
        found["values"] = (None, *differ) if None in pairs else differ
        if None not in pairs:
            del found["head_dim"]
    return {name: tuple(dict.fromkeys(raw)) for name, raw in found.items() if raw}


# What a campaign is asked to draw.


def in_words(values: Iterable[Value]) -> str:
    """Values as they are aimed at on the command line."""
    return ", ".join(f"{axis.replace(' ', '-')}={name}" for axis, name in values)


def _together(values: Sequence[Value]) -> list[tuple[Value, ...]]:
    """One value of each axis, in each way."""
    axes = dict.fromkeys(axis for axis, _ in values)
    return list(itertools.product(*([value for value in values if value[0] == axis] for axis in axes)))


def why_not_together(space: Space, *values: Value) -> str | None:
    """Why no draw has all of some values, one of each axis, maybe a mode and a level among them; None where one has."""
    if ("queries", _LONG) in values:
        causal = [mask == "causal" for axis, mask in values if axis == "mask"] or [True, False]
        if dict(values).get("level") == "layer":
            return "long documents of few keys are of kernel calls"
        if not any(takes_few_keys(space.capabilities, causal=each) for each in causal):
            return "it takes no document with fewer keys than queries"
    return space.why_never(*values)


@dataclasses.dataclass(frozen=True)
class Aims:
    """What a campaign's draws of a backend are to have."""

    space: Space
    """What the backend takes."""
    values: tuple[Value, ...]
    """Of several of one axis any."""
    levels: tuple[str, ...]
    """Of the campaign."""

    @property
    def raw(self) -> dict[str, tuple[Any, ...]]:
        """Those of them that the backend takes, as its domain has them."""
        taken = [value for value in self.values if why_not_together(self.space, value) is None]
        return aim_at(self.space, *taken, axes=ALL_AIMABLE)

    def levels_in(self, mode: str) -> tuple[str, ...]:
        """The levels at which cases of a mode have a value of each axis."""
        return tuple(level for level in self.levels if any(self._drawn(("mode", mode), ("level", level))))

    def _drawn(self, *place: Value) -> Iterator[bool]:
        return (why_not_together(self.space, *chosen, *place) is None for chosen in _together(self.values))

    def why_not(self, modes: Sequence[str]) -> str | None:
        """Why no case of some modes has all of it: the end of a sentence; None where some has."""
        if any(self.levels_in(mode) for mode in modes):
            return None
        for axis in dict.fromkeys(axis for axis, _ in self.values):
            some = [value for value in self.values if value[0] == axis]
            reasons = [why_not_together(self.space, value) for value in some]
            if all(reasons):
                return f"{in_words(some)}: {reasons[0]}"
        whys = (why_not_together(self.space, *chosen) for chosen in _together(self.values))
        elsewhere = f"not in mode {' or '.join(modes)} at level {' or '.join(self.levels)}"
        return f"{in_words(self.values)}: {next(filter(None, whys), None) or elsewhere}"
