"""Functions that tests have ranks call, apart so that a rank need not import a test."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from attn_fuzz.backends.collectives import Handle
from attn_fuzz.ranks.rank_process import here

_kept: list[Handle] = []


def gathers(times: Sequence[int]) -> int:
    """So many collectives on each rank, each waited for; the process's id."""
    for _ in range(times[here().collectives.rank]):
        here().collectives.gather(torch.ones(1), torch.empty(2)).wait()
    return os.getpid()


def unwaited(times: int) -> None:
    """So many collectives on rank 1 alone, which no other rank waits for."""
    if here().collectives.rank == 1:
        _kept.extend(here().collectives.gather(torch.ones(1), torch.empty(2)) for _ in range(times))


def at_odds() -> None:
    """A reduction on rank 0 where rank 1 gathers."""
    collectives = here().collectives
    if collectives.rank == 0:
        collectives.reduce_scatter(torch.ones(2, 4), torch.empty(1, 4)).wait()
    collectives.gather(torch.ones(1, 4), torch.empty(2, 4)).wait()
    collectives.gather(torch.ones(1, 4), torch.empty(2, 4)).wait()
