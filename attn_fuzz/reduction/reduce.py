"""The reducer: from what fails to what is simpler and fails as well, a case, a packed call, a sequence of calls.

A pass is a function from what fails to candidates, boldest first; None stands for one that cannot be. The order, and
not the pass, says what is simpler: a candidate whose ``sort_key`` is no smaller is not even tried. So a reduction ends,
never goes round in circles, and no pass undoes what another has reached.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

Pass = Callable[[T], Iterator[T | None]]
SortKey = Callable[[T], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Deadline:
    """A moment by some clock."""

    at: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float, clock: Callable[[], float] = time.monotonic) -> Deadline:
        """So many seconds from now."""
        return cls(clock() + seconds, clock)

    def passed(self) -> bool:
        """Whether that moment is over."""
        return self.clock() > self.at


class _Over(Exception):
    """The deadline has passed."""


@dataclasses.dataclass
class _Reduction(Generic[T]):
    """What a reduction has reached."""

    best: T
    tried: set[T]
    fails: Callable[[T], bool]
    sort_key: SortKey[T]
    deadline: Deadline

    def takes(self, candidate: T) -> bool:
        """Whether a candidate is new, simpler than the best and fails; it is the best from then on."""
        if candidate in self.tried or not self.sort_key(candidate) < self.sort_key(self.best):
            return False
        self.tried.add(candidate)
        if not self.fails(candidate):
            return False
        self.best = candidate
        return True

    def step(self, offers: Pass[T], begin: int) -> int | None:
        """Takes the first candidate that it can of a pass, from a place on; its place, or None where there is none."""
        for place, candidate in enumerate(offers(self.best)):
            if place < begin or candidate is None:
                continue
            if self.deadline.passed():
                raise _Over
            if self.takes(candidate):
                return place
        return None

    def run(self, offers: Pass[T]) -> bool:
        """Goes through a pass once; whether anything was taken.

        What follows a candidate that was taken has its place among those of the new best, so a pass goes on there: a
        thousand documents, of which most can go, are not tried from the first one on each time that one is gone.
        """
        place = taken = self.step(offers, 0)
        while place is not None:
            place = self.step(offers, place)
        return taken is not None


def reduce(
    start: T, passes: Sequence[Pass[T]], fails: Callable[[T], bool], sort_key: SortKey[T], deadline: Deadline
) -> T:
    """The simplest that was found to fail: no pass offers anything simpler, or the deadline has passed.

    Args:
        start: what fails.
        passes: what to try, in turn, again and again until none of them is of use.
        fails: whether a candidate fails in the same way; never called twice with the same one, nor with ``start``.
        sort_key: what makes one simpler than another: less of the first entry, then of the second, and so on.
        deadline: looked at before every candidate.
    """
    reduction = _Reduction(start, {start}, fails, sort_key, deadline)
    improved = True
    try:
        while improved:
            improved = False
            for offers in passes:
                improved |= reduction.run(offers)
    except _Over:
        pass
    return reduction.best
