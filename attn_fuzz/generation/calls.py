"""Draws batches: a packed case, and where it is cut into calls."""

from __future__ import annotations

from random import Random
from typing import Final

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.fixed_calls import draw_fixed_calls
from attn_fuzz.generation.length_sweeps import Sweep, draw_case

LONGEST: Final = {"cuda": ((64, 128), (256, 400), (16, 32)), "cpu": ((16, 32), (64, 128), (16, 32))}
"""(queries, keys) of the longest documents of batches, in turn."""

DOCUMENTS: Final = (1, 1, 2, 2, 3, 4, 4, 5, 7, 12)
"""How many documents a call may have; 4 in the mean."""

_MEAN: Final = sum(DOCUMENTS) / len(DOCUMENTS)

VALUES: Final = ("gaussian", "gaussian", "gaussian", "large", "large", "offset", "tiny", "ties")

_ANY_OPTIONS: Final = 0.4
"""Share of batches whose head dimension, head group and scale are any that are taken: some cost ten times others."""

_MOST_WORK: Final = {"cuda": 1e9, "cpu": 4e7}
"""Products of a query's and a key's channels in a batch, an eighth of a second of the reference's on a GPU and half a
one on a CPU: longer documents and wider heads make fewer calls, and would keep other processes from the device."""


def draw_batch(random: Random, sweep: Sweep, backend: Backend, domain: Domain, calls: int) -> CallBatch | None:
    """Calls that a backend takes, up to so many, or None where none of those drawn is one.

    Args:
        random: decides everything but the sweep's pairs.
        sweep: where the walk through pairs of lengths stands; it moves on.
        backend: what will run them.
        domain: the options that it takes.
        calls: how many are drawn.
    """
    if domain.capabilities.layouts:
        return draw_fixed_calls(random, backend, domain, calls, _MOST_WORK[domain.device])
    every = random.random() < _ANY_OPTIONS
    case = draw_case(random, sweep, backend, domain, max(2, round(calls * _MEAN)), every=every)
    if case is None:
        return None
    case = case.replace(values=random.choice(VALUES))
    work, count, begin = 0.0, 0, 0
    for queries, keys in zip(case.packed_lengths, case.packed_key_lengths, strict=True):
        work += queries * keys * case.heads * case.head_dim
        if count and work > _MOST_WORK[domain.device]:
            break
        count += 1
    kept: list[int] = []
    ends: list[int] = []
    while begin < count:
        end = min(begin + random.choice(DOCUMENTS), count)
        small = subset(case, range(begin, end))
        # What a call of all documents may be is not always what a few of them may be: one without any query, say.
        if small is not None and any(small.packed_lengths) and backend.refusal(small, domain.device) is None:
            kept += range(begin, end)
            ends.append(len(kept))
        begin = end
    packed = subset(case, kept) if kept else None
    return None if packed is None else CallBatch(packed, tuple(ends))
