"""From a packed call that fails to a case that the case mode takes: alone, with neighbours, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from attn_fuzz.cases.order import simplicity
from attn_fuzz.cases.simpler import narrower, simpler_options
from attn_fuzz.cases.smaller import clipped
from attn_fuzz.cases.subsets import subset
from attn_fuzz.reduction.reduce import Deadline, Pass, reduce
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
    sizes = [len(case.packed_lengths) >> shift for shift in range(1, len(case.packed_lengths).bit_length())]
    return reduce(case, [_without_runs(size) for size in sizes], fails, simplicity, Deadline.after(seconds))


def _without_runs(size: int) -> Pass[Case]:
    """Without every so many documents in turn, while there are many."""

    def offers(case: Case) -> Iterator[Case | None]:
        count = len(case.packed_lengths)
        for begin in range(0, count if count > ENOUGH else 0, size):
            yield subset(case, [i for i in range(count) if not begin <= i < begin + size])

    return offers


def plainer(case: Case, fails: Fails, seconds: float) -> Case:
    """The same call with short documents and simple options, as far as it still fails.

    Args:
        case: a failing call.
        fails: whether a call fails.
        seconds: after which what has been reached is returned.
    """
    passes = (_shorter, _shorter_on_one_side, narrower, simpler_options)
    return reduce(case, passes, fails, simplicity, Deadline.after(seconds))


def _shorter(case: Case) -> Iterator[Case | None]:
    for most in CLIPS:
        yield clipped(case, most, most)


def _shorter_on_one_side(case: Case) -> Iterator[Case | None]:
    for most in CLIPS:
        yield clipped(case, most, max(case.packed_key_lengths))
    for most in CLIPS:
        yield clipped(case, max(case.packed_lengths), most)
