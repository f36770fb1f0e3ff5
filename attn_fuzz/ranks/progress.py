"""How many collectives each rank of a group has begun, where the parent sees it while they wait for one another.

Ranks that share a sequence begin the same collectives in the same order. One that has come back after fewer than
another has begun leaves that one waiting for ever, which is certain long before any patience ends.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Final

import torch

from attn_fuzz.backends.collectives import Collectives, Handle

_COUNT: Final = struct.Struct("=Q")


class Progress:
    """Counts in a file that all ranks of a group, and their parent, have mapped.

    Args:
        path: of the file, which is made where there is none.
        ranks: how many counts it holds.
    """

    def __init__(self, path: str | Path, ranks: int) -> None:
        self._ranks = ranks
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, ranks * _COUNT.size)
            self._counts = mmap.mmap(descriptor, ranks * _COUNT.size)
        finally:
            os.close(descriptor)

    def begin(self, rank: int) -> None:
        """Notes that a rank, which nobody else writes for, begins another collective."""
        place = rank * _COUNT.size
        _COUNT.pack_into(self._counts, place, _COUNT.unpack_from(self._counts, place)[0] + 1)

    def counts(self) -> list[int]:
        """How many each rank has begun since the group was started."""
        return [count for (count,) in _COUNT.iter_unpack(self._counts)]


class Counted(Collectives):
    """Collectives that are counted as they begin.

    Args:
        collectives: what makes them.
        progress: where they are counted.
        rank: whose count that is, among all ranks of the group.
    """

    def __init__(self, collectives: Collectives, progress: Progress, rank: int) -> None:
        super().__init__(collectives.rank, collectives.ranks)
        self._collectives, self._progress, self._rank = collectives, progress, rank

    def gather(self, own: torch.Tensor, whole: torch.Tensor) -> Handle:
        self._progress.begin(self._rank)
        return self._collectives.gather(own, whole)

    def reduce_scatter(self, whole: torch.Tensor, own: torch.Tensor) -> Handle:
        self._progress.begin(self._rank)
        return self._collectives.reduce_scatter(whole, own)

    def block(self, size: int) -> Collectives:
        return Counted(self._collectives.block(size), self._progress, self._rank)
