"""How long calls have taken, so that none is made which would not end in time."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Final

from attn_fuzz.reference.case import Case

_LEAST_SECONDS: Final = 1.0
"""A call may take so long however little time is left: smaller ones would show nothing."""


def _width(case: Case) -> int:
    """Channels of all heads of a token."""
    return case.heads * max(case.head_dim, case.value_dim)


class CallTimes:
    """Seconds per document of calls of a kind, by how wide their tokens are; the slowest of each width."""

    def __init__(self) -> None:
        self._slowest: dict[Hashable, dict[int, float]] = {}

    def note(self, kind: Hashable, case: Case, seconds: float) -> None:
        """A call of a kind took so long."""
        slowest = self._slowest.setdefault(kind, {})
        per_document = seconds / len(case.packed_lengths)
        slowest[_width(case)] = max(per_document, slowest.get(_width(case), 0.0))

    def per_document(self, kind: Hashable, case: Case) -> float | None:
        """Seconds that a document of such a call takes at most; None where none of the kind has been seen.

        What a call costs grows with its width at most, and not at all where launching it is all that it costs.
        """
        seen = self._slowest.get(kind)
        if not seen:
            return None
        return min(seconds * max(1.0, _width(case) / width) for width, seconds in seen.items())

    def fits(self, kind: Hashable, case: Case, seconds: float) -> bool:
        """Whether a call is known to end within so many seconds."""
        each = self.per_document(kind, case)
        return each is not None and each * len(case.packed_lengths) <= seconds

    def most_documents(self, kind: Hashable, case: Case, seconds: float) -> int:
        """How many of its documents a call may have to end within so many seconds; all where nothing is known."""
        count, each = len(case.packed_lengths), self.per_document(kind, case)
        if not each:
            return count
        return min(count, max(1, math.floor(max(seconds, _LEAST_SECONDS) / each)))
