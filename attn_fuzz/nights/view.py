"""What can be shown of a campaign while it goes on, and told at its end."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.nights.record import Slice

_MOST_REMARKS: Final = 100


@dataclasses.dataclass
class View:
    """What can be shown of a campaign while it goes on."""

    begun: float = dataclasses.field(default_factory=time.monotonic)
    ends: float | None = None
    """On the same clock."""
    rounds: int = 0
    alive: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """Workers, by backend and device kind."""
    slices: Sequence[Slice] = ()
    """Of the round that runs."""
    done: dict[tuple[str, str], Tally] = dataclasses.field(default_factory=dict)
    """Of earlier rounds, by backend and device kind."""
    compiled: frozenset[str] = frozenset()
    """Names of backends that compile."""
    findings: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    troubles: list[str] = dataclasses.field(default_factory=list)
    """What went wrong with this machine, in sentences."""
    remarks: list[str] = dataclasses.field(default_factory=list)
    """What one slice or another could not do, and what happened to workers, in sentences."""

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.ends is None else self.ends - time.monotonic()

    def tallies(self) -> dict[tuple[str, str], Tally]:
        """What was done until now, by backend and device kind."""
        found: dict[tuple[str, str], Tally] = {}
        for subject, tally in self.done.items():
            found.setdefault(subject, Tally()).add(tally)
        for piece in self.slices:
            found.setdefault(piece.subject, Tally()).add(piece.tally)
        return found

    def trouble(self, sentence: str) -> None:
        """Notes one of ``troubles``, once."""
        if sentence not in self.troubles:
            self.troubles.append(sentence)

    def remark(self, sentence: str) -> None:
        """Notes one of ``remarks``, once, and as many as can be read."""
        if sentence not in self.remarks and len(self.remarks) < _MOST_REMARKS:
            self.remarks.append(sentence)
