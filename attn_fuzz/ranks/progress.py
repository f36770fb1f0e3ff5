"""Which collectives each rank of a group has begun, where the parent sees it while they wait for one another.

Ranks that share a sequence begin the same collectives in the same order. Two things are certain long before any
patience ends: a rank that has come back after fewer than another has begun leaves that one waiting for ever, and so do
two ranks of which one gathers where the other reduces.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Final

import torch

from attn_fuzz.backends.collectives import Collectives, Handle

_WORD: Final = struct.Struct("@Q")
"""What a rank has begun: how many in the upper bits, which in the lower ones. One aligned word, so that a reader gets
the old one or the new one, and never half of each."""

KEPT: Final = 16
"""Collectives of which a rank's word says which they were, one bit each, the last one lowest: ranks that do the same
are fewer apart."""

_KINDS: Final = (1 << KEPT) - 1


class Progress:
    """Words in a file that all ranks of a group, and their parent, have mapped.

    Args:
        path: of the file, which is made where there is none.
        ranks: how many words it holds.
    """

    def __init__(self, path: str | Path, ranks: int) -> None:
        self._ranks = ranks
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, ranks * _WORD.size)
            self._words = mmap.mmap(descriptor, ranks * _WORD.size)
        finally:
            os.close(descriptor)

    def begin(self, rank: int, *, reduces: bool) -> None:
        """Notes that a rank begins another collective, a gather or a reduction; its place is its own."""
        place = rank * _WORD.size
        (word,) = _WORD.unpack_from(self._words, place)
        count, kinds = (word >> KEPT) + 1, ((word << 1) | reduces) & _KINDS
        _WORD.pack_into(self._words, place, (count << KEPT) | kinds)

    def words(self) -> list[int]:
        """What each rank has begun since the group was started."""
        return [word for (word,) in _WORD.iter_unpack(self._words)]

    def counts(self) -> list[int]:
        """How many each rank has begun since the group was started."""
        return [word >> KEPT for word in self.words()]

    def at_odds(self) -> tuple[int, int] | None:
        """Two ranks of which one gathered where the other reduced, if there are such."""
        words = list(enumerate(self.words()))
        pairs = ((one, other) for (one, first), (other, second) in combinations(words, 2) if _differ((first, second)))
        return next(pairs, None)


def _differ(words: Sequence[int]) -> bool:
    """Whether two ranks' words disagree about a collective that both have begun and still name."""
    fewer, more = sorted(words, key=lambda word: word >> KEPT)
    ahead = (more >> KEPT) - (fewer >> KEPT)
    both = min(KEPT - ahead, fewer >> KEPT)
    return both > 0 and ((((more & _KINDS) >> ahead) ^ fewer) & ((1 << both) - 1)) != 0


class Counted(Collectives):
    """Collectives that are noted as they begin.

    Args:
        collectives: what makes them.
        progress: where they are noted.
        rank: for whom that is, among all ranks of the group.
    """

    def __init__(self, collectives: Collectives, progress: Progress, rank: int) -> None:
        super().__init__(collectives.rank, collectives.ranks)
        self._collectives, self._progress, self._rank = collectives, progress, rank
        # What a user's layer does with it is not counted: a ring may send to one neighbour alone.
        self.group = collectives.group

    def gather(self, own: torch.Tensor, whole: torch.Tensor) -> Handle:
        self._progress.begin(self._rank, reduces=False)
        return self._collectives.gather(own, whole)

    def reduce_scatter(self, whole: torch.Tensor, own: torch.Tensor) -> Handle:
        self._progress.begin(self._rank, reduces=True)
        return self._collectives.reduce_scatter(whole, own)

    def block(self, size: int) -> Collectives:
        return Counted(self._collectives.block(size), self._progress, self._rank)
