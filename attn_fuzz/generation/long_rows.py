"""Documents of thousands of queries over few keys, in calls whose documents come from a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Final

import torch

from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layouts import FEW_KEYS, LONG_ROWS, takes_few_keys
from attn_fuzz.reference.case import Case

LONG_WORK: Final = 1 << 23
"""Products of a query's and a key's channels in such a document."""

WORK_ON: Final = {"cuda": LONG_WORK, "cpu": 1 << 19}
"""The same by device: a CPU takes ten times as long for its own channels."""

LAYOUTS_FOR_ONE: Final = 6
"""Of so many layouts of what compiles for shapes, one has such a document."""

Lengths = tuple[torch.Tensor, torch.Tensor]
"""(queries, keys) of each document, int64."""


def with_long_row(random: Random, drawn: Lengths, options: dict[str, object], domain: Domain, work: int) -> Lengths:
    """Lengths with a document of thousands of queries and few keys in place of another, where those are taken.

    Fewer keys the more channels there are, and no such document where even one key takes too long, unless it is aimed
    at: then the shortest, over one key.

    Args:
        random: decides.
        drawn: lengths as they were.
        options: of the case.
        domain: what is taken, and aimed at.
        work: the most products of channels in it.
    """
    lengths, keys = drawn
    rows, place = random.choice(LONG_ROWS), random.randrange(len(lengths))
    if (long := _over_few_keys(random, rows, options, domain, work)) is None:
        return lengths, keys
    lengths, keys = lengths.clone(), keys.clone()
    lengths[place], keys[place] = long
    return lengths, keys


def _over_few_keys(
    random: Random, rows: int, options: Mapping[str, object], domain: Domain, work: int
) -> tuple[int, int] | None:
    """(queries, keys) of a document of so many rows, or None where it is not taken, or takes too long."""
    width = int(options["heads"]) * max(int(options["head_dim"]), int(options.get("head_dim_v") or 0))  # type: ignore[call-overload]
    most = min(FEW_KEYS, work // (rows * width))
    if not most and domain.decided("long_rows"):
        rows, most = min(LONG_ROWS), 1
    if not most or not takes_few_keys(domain.capabilities, causal=bool(options["causal"])):
        return None
    return rows, random.randint(1, most)


def pooled_long(number: int, options: Mapping[str, object], domain: Domain) -> tuple[int, int] | None:
    """(queries, keys) of the long document of a layout for what compiles for shapes, always the same; None of most.

    Every layout has one where that is aimed at, as far as it is taken.

    Args:
        number: of the layout.
        options: of the case, all but its documents.
        domain: what is taken, and aimed at.
    """
    wanted = domain.decided("long_rows")
    if not (number % LAYOUTS_FOR_ONE == LAYOUTS_FOR_ONE - 1 if wanted is None else wanted):
        return None
    source = Random(f"the long document of layout {number}")
    return _over_few_keys(source, source.choice(LONG_ROWS), options, domain, WORK_ON[domain.device])


def long_places(case: Case) -> list[int]:
    """Which documents of a packed call have thousands of queries."""
    return [place for place, queries in enumerate(case.packed_lengths) if queries >= min(LONG_ROWS)]


def with_many_long_rows(random: Random, case: Case, domain: Domain, apart: int, work: int) -> Case:
    """A packed call whose first document, and further ones, have thousands of queries, where those are taken.

    Args:
        random: decides.
        case: the call.
        domain: what is taken.
        apart: documents from one to the next.
        work: the most products of channels in one.
    """
    lengths, keys = torch.tensor(case.packed_lengths), torch.tensor(case.packed_key_lengths)
    options: dict[str, object] = {name: getattr(case, name) for name in ("heads", "head_dim", "head_dim_v", "causal")}
    for place in range(0, len(lengths), apart):
        one = slice(place, place + 1)
        lengths[one], keys[one] = with_long_row(random, (lengths[one], keys[one]), options, domain, work)
    return case.replace(lengths=tuple(lengths.tolist()), key_lengths=tuple(keys.tolist()))
