"""What was reached of all that a backend's declarations allow, and what never was."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from attn_fuzz.coverage.axes import Value
from attn_fuzz.coverage.counts import Pair
from attn_fuzz.nights.database import Database
from attn_fuzz.nights.spaces import space_of
from attn_fuzz.nights.totals import pairs_of, refusals_of


@functools.cache
def allowed(backend: str, kind: str) -> frozenset[Pair]:
    """Pairs of values, and single ones, that a backend may be asked for on a kind of device.

    Raises:
        UnknownBackend: when there is none of that name.
        BackendUnavailable: when it cannot be imported.
    """
    return frozenset(space_of(backend, kind).pairs())


def share(reached: Mapping[Pair, int], backend: str, kind: str) -> float:
    """The share of those that were reached, from 0 to 1."""
    may = allowed(backend, kind)
    return len(may & reached.keys()) / len(may) if may else 1.0


class Coverage(NamedTuple):
    """What was reached of a backend on a kind of device."""

    backend: str
    kind: str
    values: dict[Value, int]
    """Cases by value, of those that it may be asked for."""
    pairs: dict[Pair, int]
    """Cases by pair of two values, likewise."""
    refused: Counter[str]
    """Draws that were not taken, by why."""

    @property
    def values_never(self) -> list[Value]:
        """Values without a case."""
        return [value for value, cases in self.values.items() if not cases]

    @property
    def pairs_never(self) -> list[Pair]:
        """Pairs without a case of values that have some."""
        return [
            (one, other)
            for (one, other), cases in self.pairs.items()
            if not cases and self.values[one] and self.values[other]
        ]

    @property
    def share(self) -> float:
        """Of all values and pairs, from 0 to 1."""
        every = [*self.values.values(), *self.pairs.values()]
        return sum(map(bool, every)) / len(every) if every else 1.0


def coverage_of(database: Database, backend: str, kind: str) -> Coverage:
    """What was reached of a backend in all campaigns.

    Raises:
        UnknownBackend: when there is none of that name any more.
        BackendUnavailable: when it cannot be imported.
    """
    may, reached = space_of(backend, kind), pairs_of(database, backend, kind)
    every = list(may.pairs())
    return Coverage(
        backend,
        kind,
        {one: reached[one, one] for one, other in every if one == other},
        {pair: reached[pair] for pair in every if pair[0] != pair[1]},
        refusals_of(database, backend, kind),
    )
