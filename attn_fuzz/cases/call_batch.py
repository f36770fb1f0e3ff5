"""A batch: a packed case, and where it is cut into calls. A case by itself is a batch of one call.

A call of a layer case is a packed sequence of its own, with micro-sequences of its own.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Final

from attn_fuzz.cases.subsets import subset
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import Span, borders

PADDING: Final = 1 << 23
"""Documents of a layer's batch with names from here on are padding of the calls that they end. By itself such a call
has the padding that any case has, of other values."""


@dataclasses.dataclass(frozen=True)
class CallBatch:
    """Small calls that share everything but their documents."""

    case: Case
    """A case of all documents, each under its own name; of a layer, one of whose cuts is where each call ends."""
    ends: tuple[int, ...]
    """One past the last document of each call."""

    def __post_init__(self) -> None:
        count = len(self.case.packed_lengths)
        if not self.ends or self.ends[-1] != count or any(a >= b for a, b in zip((0, *self.ends), self.ends)):
            raise ValueError(f"calls must end at rising places up to {count}, not {self.ends}")
        if self.case.level == "layer" and (inside := {span.end for span in self.tokens[:-1]} - set(self.case.cuts)):
            raise ValueError(f"calls of a layer must end where it is cut, but {min(inside)} is no cut")

    @classmethod
    def of(cls, case: Case | None, ends: tuple[int, ...]) -> CallBatch | None:
        """Calls of a case, cut where they end if it is a layer's; None where there is none, or a call has no token."""
        if case is None or not ends or ends[-1] != len(case.packed_lengths):
            return None
        if case.level == "layer" and len(ends) > 1:
            rows = borders(case.packed_lengths)
            stops = [rows[end] for end in ends]
            if any(begin == end for begin, end in itertools.pairwise((0, *stops))):
                return None
            cuts = tuple(sorted({*case.cuts, *stops[:-1]}))
        else:
            cuts = case.cuts
        try:
            # Ranks cannot share what ends anywhere.
            return cls(case.replace(cuts=cuts), ends)
        except ValueError:
            return None

    @classmethod
    def of_calls(cls, case: Case, ends: tuple[int, ...], calls: Sequence[Case]) -> CallBatch:
        """A batch whose calls, as they would be cut out of it, are there already: making a case takes some time."""
        batch = cls(case, ends)
        if len(ends) > 1:
            vars(batch)["calls"] = tuple(calls)
        return batch

    @functools.cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First document of each call, and one past its last."""
        return tuple(zip((0, *self.ends[:-1]), self.ends, strict=True))

    @functools.cached_property
    def tokens(self) -> tuple[Span, ...]:
        """The query rows of each call."""
        rows = borders(self.case.packed_lengths)
        return tuple(Span(rows[begin], rows[end]) for begin, end in self.spans)

    @functools.cached_property
    def calls(self) -> tuple[Case, ...]:
        """Each call, as a case of its own."""
        return tuple(self.call(index) for index in range(len(self.ends)))

    @classmethod
    def of_one(cls, case: Case) -> CallBatch:
        """A case as a batch of one call."""
        return cls(case, (len(case.packed_lengths),))

    def call(self, index: int) -> Case:
        """One of the calls, as a case of its own with the same values."""
        small = self.attempted(index)
        assert small is not None
        return small

    def attempted(self, index: int) -> Case | None:
        """The same, or None where it is no case: of documents without keys, say."""
        if self.case.level == "layer":
            return self._sequence(index)
        return subset(self.case, range(*self.spans[index]))

    def _sequence(self, index: int) -> Case:
        """One of a layer's calls: cuts are counted from where it begins."""
        case, documents, (begin, end) = self.case, slice(*self.spans[index]), self.tokens[index]
        if len(self.ends) == 1:
            return case
        first, last = bisect.bisect_right(case.cuts, begin), bisect.bisect_left(case.cuts, end)
        lengths, ids = case.packed_lengths[documents], case.packed_ids[documents]
        *rest, behind = lengths
        padded = ids[-1] >= PADDING and any(rest)
        return case.replace(
            lengths=tuple(rest) if padded else lengths,
            document_ids=ids[:-1] if padded else ids,
            padding=behind if padded else 0,
            cuts=tuple(cut - begin for cut in case.cuts[first:last]),
        )

    def other(self, seed: int) -> CallBatch:
        """The same calls with other values."""
        return CallBatch(self.case.replace(seed=seed), self.ends)

    def first(self, calls: int) -> CallBatch:
        """So many of its calls, with the same values."""
        if calls >= len(self.ends):
            return self
        case, ends = self.case, self.ends[:calls]
        if case.level == "layer":
            # Padding that ends the last of them stays a document, whose name its values go by.
            lengths, ids = case.packed_lengths[: ends[-1]], case.packed_ids[: ends[-1]]
            cuts = case.cuts[: bisect.bisect_left(case.cuts, self.tokens[calls - 1].end)]
            some = case.replace(lengths=lengths, document_ids=ids, padding=0, cuts=cuts)
            return CallBatch.of_calls(some, ends, self.calls[:calls])
        small = subset(case, range(ends[-1]))
        assert small is not None
        return CallBatch(small, ends)
