"""Where a kernel call's rows lie and what bounds it is told: looser ones than needed, and rows between documents."""

from __future__ import annotations

import functools
from random import Random
from typing import Any, Final

from hypothesis import strategies as st

from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layouts import among, seldom

Sides = tuple[int, int]
"""Of queries and of keys."""

LOOSE: Final[dict[str, tuple[Sides, ...]]] = {
    "cpu": ((1, 1), (5, 0), (0, 5), (1, 130), (130, 1), (64, 300)),
    "cuda": ((1, 1), (5, 0), (0, 5), (1, 130), (130, 1), (64, 300), (1000, 2000)),
}
"""By how much bounds exceed the longest document: a row, another tile, many tiles."""

GAPS: Final[tuple[Sides, ...]] = ((1, 1), (3, 0), (0, 3), (1, 17), (17, 2), (130, 64))
"""Rows between documents: one, less than a tile, more than one."""

_MOST_BETWEEN: Final = 1024
"""Rows between documents, of both sides: they cost as much to place as others."""

_ONCE_IN: Final = 4
"""A quarter of the cases has looser bounds, and another one gaps."""


@functools.lru_cache(maxsize=64)
def gaps_taken(sides: tuple[str, ...]) -> tuple[Sides, ...]:
    """Gaps on those sides that a backend takes."""
    taken = [(queries * ("q" in sides), keys * ("k" in sides)) for queries, keys in GAPS]
    return tuple(dict.fromkeys(each for each in taken if any(each)))


def _gaps_aimed_at(domain: Domain, documents: int, rows: int) -> list[Sides] | None:
    """Those that are aimed at, of so many documents and with at most so many rows; where none has so few, the smallest.

    None where no gaps are aimed at.
    """
    if (wanted := domain.aim.get("gaps")) is None:
        return None
    taken = ((0, 0), *gaps_taken(domain.capabilities.gaps))
    aimed = [each for each in taken if (each[0] > 0, each[1] > 0) in wanted]
    return [each for each in aimed if sum(each) * documents <= rows] or sorted(aimed, key=sum)[:1] or [(0, 0)]


def placed_at_random(random: Random, domain: Domain, documents: int, rows: int) -> dict[str, Any]:
    """The same for the calls of a batch.

    Args:
        random: decides.
        domain: of the backend.
        documents: of all calls.
        rows: of those, queries and keys together; there are no more between them.
    """
    capabilities, found = domain.capabilities, dict[str, Any]()
    if capabilities.layouts:
        return found
    loose = domain.decided("max_seqlen")
    if capabilities.loose_max_seqlen and (not random.randrange(_ONCE_IN) if loose is None else loose):
        found["loose_max_seqlen"] = random.choice(LOOSE[domain.device])
    if (aimed := _gaps_aimed_at(domain, documents, rows)) is not None:
        return {**found, "gaps": random.choice(aimed)}
    gaps = [each for each in gaps_taken(capabilities.gaps) if sum(each) * documents <= rows]
    if gaps and not random.randrange(_ONCE_IN):
        found["gaps"] = random.choice(gaps)
    return found


def placed(draw: st.DrawFn, domain: Domain, documents: int) -> dict[str, Any]:
    """Fields of a kernel case of so many documents, of what its backend takes."""
    capabilities, found = domain.capabilities, dict[str, Any]()
    loose = domain.decided("max_seqlen")
    if capabilities.loose_max_seqlen and (draw(seldom(_ONCE_IN)) if loose is None else loose):
        found["loose_max_seqlen"] = draw(among(LOOSE[domain.device]))
    if (aimed := _gaps_aimed_at(domain, documents, _MOST_BETWEEN)) is not None:
        return {**found, "gaps": draw(among(aimed))}
    fitting = [each for each in gaps_taken(capabilities.gaps) if sum(each) * documents <= _MOST_BETWEEN]
    between = draw(seldom(_ONCE_IN)) if fitting else False
    if between:
        found["gaps"] = draw(among(fitting))
    return found
