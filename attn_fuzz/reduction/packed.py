"""From a packed call that fails to a case that the case mode takes: alone, with neighbours, by bisection."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from attn_fuzz.cases.simpler import narrower, simpler_options
from attn_fuzz.cases.smaller import clipped
from attn_fuzz.cases.subsets import subset
from attn_fuzz.reference.case import Case

Fails = Callable[[Case], bool]

CANDIDATES: Final = 3
"""Documents tried on their own: of a fault's many victims the worst few are as good as any."""

NEIGHBOURS: Final = (0, 1, 4)
"""How many on each side come along."""

CLIPS: Final = (1, 2, 4, 8, 16, 32)
"""Lengths to which all documents of a call are cut down at once."""

ENOUGH: Final = 12
"""Documents that the case mode shrinks by itself."""


def candidates(case: Case, documents: Sequence[int]) -> list[Case]:
    """Small calls around the suspects: each alone first, then with neighbours."""
    found: dict[Case, None] = {}
    count = len(case.packed_lengths)
    for reach in NEIGHBOURS:
        for place in documents[:CANDIDATES]:
            small = subset(case, range(max(place - reach, 0), min(place + reach + 1, count)))
            if small is not None:
                found[small] = None
    return list(found)


def bisected(case: Case, fails: Fails, seconds: float) -> Case:
    """A smaller packed call that still fails: halves, quarters and so on are taken out for good where it does.

    Args:
        case: a failing call.
        fails: whether a call fails.
        seconds: after which what has been reached is returned.
    """
    deadline = time.monotonic() + seconds
    size = len(case.packed_lengths) // 2
    while size >= 1 and len(case.packed_lengths) > ENOUGH:
        begin, count = 0, len(case.packed_lengths)
        while begin < count and count > ENOUGH:
            if time.monotonic() > deadline:
                return case
            small = subset(case, [i for i in range(count) if not begin <= i < begin + size])
            if small is not None and fails(small):
                case, count = small, len(small.packed_lengths)
            else:
                begin += size
        size = min(size, count) // 2
    return case


def plainer(case: Case, fails: Fails, seconds: float) -> Case:
    """The same call with short documents and simple options, as far as it still fails.

    Args:
        case: a failing call.
        fails: whether a call fails.
        seconds: after which what has been reached is returned.
    """
    deadline = time.monotonic() + seconds
    longest_q, longest_k = max(case.packed_lengths), max(case.packed_key_lengths)
    both = ((clip, clip) for clip in CLIPS)
    one = [*((clip, longest_k) for clip in CLIPS), *((longest_q, clip) for clip in CLIPS)]
    for queries, keys in (*both, *one):
        small = clipped(case, queries, keys)
        if time.monotonic() > deadline:
            return case
        if small is not None and small != case and fails(small):
            case = small
            break
    tried = {case}
    progress = True
    while progress:
        progress = False
        for small in (*narrower(case), *simpler_options(case)):
            if time.monotonic() > deadline:
                return case
            if small is not None and small not in tried:
                tried.add(small)
                if fails(small):
                    case, progress = small, True
                    break
    return case
