"""A batch: a packed case, and where it is cut into calls. A case by itself is a batch of one call."""

from __future__ import annotations

import dataclasses
import functools

from attn_fuzz.cases.subsets import subset
from attn_fuzz.reference.case import Case


@dataclasses.dataclass(frozen=True)
class CallBatch:
    """Small calls that share everything but their documents."""

    case: Case
    """A kernel case of all documents, each under its own name."""
    ends: tuple[int, ...]
    """One past the last document of each call."""

    def __post_init__(self) -> None:
        count = len(self.case.packed_lengths)
        if not self.ends or self.ends[-1] != count or any(a >= b for a, b in zip((0, *self.ends), self.ends)):
            raise ValueError(f"calls must end at rising places up to {count}, not {self.ends}")

    @functools.cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First document of each call, and one past its last."""
        return tuple(zip((0, *self.ends[:-1]), self.ends, strict=True))

    @classmethod
    def of_one(cls, case: Case) -> CallBatch:
        """A kernel case as a batch of one call."""
        return cls(case, (len(case.packed_lengths),))

    def call(self, index: int) -> Case:
        """One of the calls, as a case of its own with the same values."""
        small = subset(self.case, range(*self.spans[index]))
        assert small is not None
        return small

    def other(self, seed: int) -> CallBatch:
        """The same calls with other values."""
        return CallBatch(self.case.replace(seed=seed), self.ends)

    def first(self, calls: int) -> CallBatch:
        """So many of its calls."""
        ends = self.ends[:calls]
        small = subset(self.case, range(ends[-1]))
        assert small is not None
        return CallBatch(small, ends)
