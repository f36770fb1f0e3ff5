"""Which pairs of values a backend could be asked for: what its declarations allow, and what is drawn at all."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.backends.registry import Backend
from attn_fuzz.coverage.axes import AXES, GAPS, PLACES, VALUES, Value, dim_of, group_of, value_channels_of
from attn_fuzz.coverage.counts import Pair
from attn_fuzz.coverage.places import Place, places
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layouts import takes_few_keys
from attn_fuzz.generation.placement import gaps_taken
from attn_fuzz.reference.case import FAR_MEMORIES

Chosen = dict[str, str]
"""One value or two, by axis."""


@dataclasses.dataclass(frozen=True)
class Space:
    """What could be reached of a backend on a device."""

    capabilities: Capabilities
    device: str
    """``cpu`` or ``cuda``."""
    levels: tuple[str, ...]
    batched: tuple[str, ...]
    """The levels at which its calls come in batches."""

    @classmethod
    def of(cls, backend: Backend, kind: str, batched: Sequence[str], dtypes: Sequence[str] = ()) -> Space:
        """That of a backend.

        Args:
            backend: as it was declared and found out to be.
            kind: of device, ``cpu`` or ``cuda``.
            batched: the levels at which its calls come in batches.
            dtypes: to draw from; none for all.
        """
        stated = backend.kernel.capabilities_on(kind)
        taken = tuple(dtype for dtype in stated.dtypes if not dtypes or dtype in dtypes)
        return cls(dataclasses.replace(stated, dtypes=taken), kind, backend.levels, tuple(batched))

    @functools.cached_property
    def domain(self) -> Domain:
        """What is drawn from."""
        return Domain.of(self.capabilities, self.device)

    def values(self) -> list[Value]:
        """Values that may be reached, in the order of ``axes.VALUES``."""
        return [value for value in VALUES if self.why_not(value, value) is None]

    def pairs(self) -> Iterator[Pair]:
        """Pairs of values of two axes that may be reached, and single values."""
        values = self.values()
        yield from ((value, value) for value in values)
        yield from (pair for pair in itertools.combinations(values, 2) if self.why_not(*pair) is None)

    def places(self, *values: Value) -> list[Place]:
        """Where all of some values may occur."""
        return [
            place
            for place in places(self.device)
            if place.level in (self.batched if place.mode == "batch" else self.levels) and place.has(dict(values))
        ]

    def why_not(self, one: Value, other: Value) -> str | None:
        """Why two values do not go together, or one value alone does not occur; None where they may."""
        if one[0] == other[0] and one != other:
            return "a case has one value of an axis"
        chosen = dict((one, other))
        return next((why for holds, why in RULES if not holds(self, chosen)), None)

    def why_never(self, *values: Value) -> str | None:
        """Why values of different axes do not go together even where all of them are aimed at; None where they may."""
        chosen = dict(values)
        return next((why for holds, why in _ALWAYS if not holds(self, chosen)), None)


def _options_taken(space: Space, chosen: Chosen) -> bool:
    """Each option by itself."""
    c, domain = space.capabilities, space.domain
    dims = {dim_of(dim) for dim in (*domain.every_head_dim, *(dim for dim, _ in domain.value_dims))}
    groups = {group_of(*pair) for pair in (*domain.head_groups, *domain.many_heads)}
    taken = {
        "dtype": set(domain.dtypes),
        "head_dim": dims,
        "group": groups,
        "mask": {name for name, takes in (("causal", c.causal), ("full", c.noncausal)) if takes},
        "window": set(AXES[4].values) if c.window else {"none"},
        "softcap": {"off", "on"} if c.softcap else {"off"},
        "LSE gradient": {"off", "on"} if c.lse_gradient else {"off"},
        "memory": {*c.memories, *(() if c.layouts else c.far_memories)},
        "max_seqlen": {"tight", "loose"} if c.loose_max_seqlen and not c.layouts else {"tight"},
        "gaps": {"none", *(GAPS[each[0] > 0, each[1] > 0] for each in gaps_taken(c.gaps) if not c.layouts)},
        "value channels": {"same", *(value_channels_of(*pair) for pair in domain.value_dims)},
    }
    return all(chosen[axis] in values for axis, values in taken.items() if axis in chosen)


def _masks_taken(space: Space, chosen: Chosen) -> bool:
    window, mask = chosen.get("window", "none"), chosen.get("mask")
    if window in ("right", "both") and (mask == "causal" or not space.capabilities.noncausal):
        return False
    narrow = space.capabilities.window_needs_causal
    return not narrow or window == "none" or (mask != "full" and window == "left")


def _compiled(space: Space, chosen: Chosen) -> bool:
    """One of the configurations that a compiling backend takes has all of it."""
    every = space.capabilities.configurations
    return not every or any(_has(each, chosen) for each in every)


def _has(configuration: Configuration, chosen: Chosen) -> bool:
    mine = {
        "dtype": configuration.dtype,
        "head_dim": dim_of(configuration.head_dim),
        "group": group_of(configuration.heads, configuration.kv_heads),
        "mask": "causal" if configuration.causal else "full",
        "window": configuration.window,
        "softcap": "on" if configuration.softcap else "off",
        "value channels": value_channels_of(configuration.head_dim, configuration.head_dim_v),
    }
    return all(chosen.get(axis, value) == value for axis, value in mine.items())


def _lengths_taken(space: Space, chosen: Chosen) -> bool:
    """Documents without queries, without keys, or with fewer keys than queries."""
    c = space.capabilities
    queries, keys = chosen.get("queries"), chosen.get("keys")
    if queries == "0" and keys in (None, "0") and not c.empty_documents:
        return keys is None and c.keys_without_queries
    if keys == "0" and queries != "0" and not c.queries_without_keys:
        return queries is None and c.empty_documents
    if queries is None or keys is None:
        return True
    if queries == "0" and keys != "0" and not c.keys_without_queries:
        return False
    fewer = PLACES["queries", queries] - PLACES["queries", "0"] > PLACES["keys", keys] - PLACES["keys", "0"]
    return not fewer or any(takes_few_keys(c, causal=causal) for causal in (True, False))


_OF_LAYERS: Final = {"LSE gradient": "off", "max_seqlen": "tight", "gaps": "none"}
"""What a layer has of axes of kernel calls: it keeps its LSE to itself, and makes its calls as they are needed."""


def _a_call(space: Space, chosen: Chosen) -> bool:
    if all(chosen.get(axis, usual) == usual for axis, usual in _OF_LAYERS.items()):
        return True
    return any(place.level == "kernel" for place in space.places(*chosen.items()))


def _values_as_wide(space: Space, chosen: Chosen) -> bool:
    """Values of a layer are as wide as its keys; of a kernel, as wide as some that it takes."""
    channels, head_dim = chosen.get("value channels", "same"), chosen.get("head_dim")
    if channels == "same":
        same = {dim_of(dim) for dim in space.domain.every_head_dim}
        return head_dim is None or "value channels" not in chosen or head_dim in same
    kernels = any(place.level == "kernel" for place in space.places(*chosen.items()))
    pairs = {(dim_of(dim), value_channels_of(dim, other)) for dim, other in space.domain.value_dims}
    return kernels and any(other == channels and head_dim in (None, dim) for dim, other in pairs)


def _values_of_groups(space: Space, chosen: Chosen) -> bool:
    """Beside grouped heads values are as wide as keys where no others are taken there, and keys as wide as any are."""
    if space.capabilities.gqa_head_dims_v or chosen.get("group", "1") == "1":
        return True
    same = {dim_of(dim) for dim in space.domain.every_head_dim}
    return chosen.get("value channels", "same") == "same" and chosen.get("head_dim") in (None, *same)


def _somewhere(space: Space, chosen: Chosen) -> bool:
    return bool(space.places(*chosen.items()))


def _shares_rows(space: Space, chosen: Chosen) -> bool:
    if chosen.get("memory") not in ("broadcast", *FAR_MEMORIES):
        return True
    return any((place.mode, place.level) == ("case", "kernel") for place in space.places(*chosen.items()))


LEFT_OUT: Final[dict[str, tuple[tuple[Value, Value], ...]]] = {
    "cpu": (
        # Sixteen tiles of scores for each of so many heads: it costs too much.
        (("group", "9-"), ("queries", "128-255")),
        # Packed calls and batches have no such documents on a CPU, and single calls that have one have few others.
        (("queries", "128-255"), ("documents", "17-64")),
        (("queries", "128-255"), ("documents", "65-")),
        # A long past, which one single call of six has, stands before few queries, and in calls of few documents.
        (("queries", "64-127"), ("keys", "256-")),
        (("keys", "256-"), ("documents", "17-64")),
        (("keys", "256-"), ("documents", "65-")),
        # Fewer keys than a long document has queries: one single call of a hundred.
        (("queries", "128-255"), ("keys", "0")),
        (("queries", "128-255"), ("keys", "1")),
        (("queries", "128-255"), ("keys", "2-15")),
        (("queries", "128-255"), ("keys", "64-127")),
        (("queries", "256-"), ("keys", "0")),
        (("queries", "256-"), ("keys", "64-127")),
        # Rows that are one are of single calls, which seldom have so many documents.
        (("memory", "broadcast"), ("documents", "17-64")),
        (("memory", "broadcast"), ("documents", "65-")),
    ),
    # Longer documents come there by the thousand.
    "cuda": (),
}
"""Pairs that strategies draw nearly never, by kind of device."""


def _drawn(space: Space, chosen: Chosen) -> bool:
    if chosen.get("memory") in FAR_MEMORIES and not chosen.keys() <= {"memory", *_WITH_FAR}:
        return False
    return all(dict(pair) != chosen for pair in LEFT_OUT[space.device])


_WITH_FAR: Final = ("level", "mode", "dtype", "mask")
"""Axes of which a value is drawn with each memory whose rows are far apart, which one call of 150 has."""


def _has_a_row_and_a_key(space: Space, chosen: Chosen) -> bool:
    return chosen.get("documents") != "1" or "0" not in (chosen.get("queries"), chosen.get("keys"))


RULES: Final[tuple[tuple[Callable[[Space, Chosen], bool], str], ...]] = (
    (_options_taken, "it is not declared"),
    (_masks_taken, "causal attention sees nothing to the right, and some backends have windows of it alone"),
    (_compiled, "it would have to be compiled"),
    (_lengths_taken, "such documents are not declared"),
    (_has_a_row_and_a_key, "a call has a query and a key"),
    (_somewhere, "it is not asked there"),
    (_a_call, "it is of kernel calls: a layer keeps its LSE to itself, and makes its calls as they are needed"),
    (_values_as_wide, "layers have values as wide as their keys, and kernels some others"),
    (_values_of_groups, "values of another head_dim than keys are not declared with grouped heads"),
    (_drawn, "it is drawn nearly never"),
    (_shares_rows, "tensors whose rows are one, or far apart, are drawn for single kernel calls only"),
)
"""What must hold, and why not where it does not."""


def _shares_rows_aimed_at(space: Space, chosen: Chosen) -> bool:
    """Rows that are far apart are in every mode's kernel calls where they are aimed at."""
    if chosen.get("memory") not in FAR_MEMORIES:
        return _shares_rows(space, chosen)
    return any(place.level == "kernel" for place in space.places(*chosen.items()))


_ALWAYS: Final = (
    *((holds, why) for holds, why in RULES if holds not in (_drawn, _shares_rows)),
    (_shares_rows_aimed_at, "tensors whose rows are one are drawn for single kernel calls only, others for kernels"),
)
"""The same where values are aimed at: then they are drawn, however seldom that is otherwise."""
