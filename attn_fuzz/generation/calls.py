"""Draws batches: a packed case, and where it is cut into calls."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.fixed_calls import draw_fixed_calls
from attn_fuzz.generation.length_sweeps import Sweep, draw_case
from attn_fuzz.generation.long_rows import WORK_ON, long_places, with_many_long_rows
from attn_fuzz.reference.case import Case

LONGEST: Final = {"cuda": ((64, 128), (256, 400), (16, 32)), "cpu": ((16, 32), (64, 128), (16, 32))}
"""(queries, keys) of the longest documents of batches, in turn."""

DOCUMENTS: Final = (1, 1, 2, 2, 3, 4, 4, 5, 7, 12)
"""How many documents a call may have; 4 in the mean."""

_MEAN: Final = sum(DOCUMENTS) / len(DOCUMENTS)

VALUES: Final = ("gaussian", "gaussian", "gaussian", "large", "large", "offset", "tiny", "ties")

_ANY_OPTIONS: Final = 0.4
"""Share of batches whose head dimension, head group and scale are any that are taken: some cost ten times others."""

_MOST_WORK: Final = {"cuda": 1e9, "cpu": 4e7}
"""Products of a query's and a key's channels in a batch, an eighth of a second of the reference's: longer documents and
wider heads make fewer calls, and would keep other processes from the device."""

_SCORE: Final = {"cuda": 0, "cpu": 45}
"""What a score takes the reference beside its products of channels, in such products: a CPU passes over it some forty
times."""

_CHANNEL: Final = {"cuda": 0, "cpu": 33}
"""What a channel of a query or a key takes, drawn, placed and judged, in the same."""


def _affordable(case: Case, device: str) -> int:
    """How many of its documents, from the first on, the reference has time for: at least one."""
    work, channels = 0.0, (case.head_dim + case.value_dim) / 2
    for index, (queries, keys) in enumerate(zip(case.packed_lengths, case.packed_key_lengths, strict=True)):
        of_head = queries * keys * (channels + _SCORE[device])
        of_head += (queries + keys) * channels * _CHANNEL[device]
        work += case.heads * of_head
        if index and work > _MOST_WORK[device]:
            return index
    return len(case.packed_lengths)


def repeated(random: Random, batch: CallBatch, some: Sequence[int], device: str, calls: int) -> CallBatch:
    """Up to so many calls that are as some of a batch's but for their values.

    Args:
        random: decides which, and their values.
        batch: calls for which everything is compiled.
        some: which of them.
        device: ``cpu`` or ``cuda``.
        calls: how many.
    """
    case, documents, ends = batch.case, list[int](), list[int]()
    for begin, end in (batch.spans[index] for index in random.choices(some, k=calls)):
        documents += range(begin, end)
        ends.append(len(documents))
    packed = case.replace(
        lengths=tuple(case.packed_lengths[place] for place in documents),
        key_lengths=tuple(case.packed_key_lengths[place] for place in documents),
        document_ids=None,
        values=random.choice(VALUES),
        seed=random.randrange(1 << 16),
    )
    affordable = _affordable(packed, device)
    return CallBatch(packed, tuple(ends)).first(max(sum(end <= affordable for end in ends), 1))


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
    every, long = random.random() < _ANY_OPTIONS, WORK_ON[domain.device]
    long_in_all = domain.decided("long_rows")
    # A CPU takes seconds for thousands of rows of wide heads.
    every = every and not (long_in_all and domain.device == "cpu")
    case = draw_case(random, sweep, backend, domain, max(2, round(calls * _MEAN)), every=every, long=long)
    if case is None:
        return None
    case = case.replace(values=random.choice(VALUES))
    if long_in_all:
        case = with_many_long_rows(random, case, domain, round(_MEAN), long)
    places = long_places(case) if long_in_all else []
    count, begin = _affordable(case, domain.device), 0
    kept: list[int] = []
    ends: list[int] = []
    while begin < count:
        end = min(begin + random.choice(DOCUMENTS), count)
        if places:
            # Each call has one, as far as there are some; what follows the last is left out.
            end = max(end, next((place + 1 for place in places if place >= begin), count + 1))
            if end > count:
                break
        small = subset(case, range(begin, end))
        # What a call of all documents may be is not always what a few of them may be: one without any query, say.
        if small is not None and any(small.packed_lengths) and backend.refusal(small, domain.device) is None:
            kept += range(begin, end)
            ends.append(len(kept))
        begin = end
    packed = subset(case, kept) if kept else None
    return None if packed is None else CallBatch(packed, tuple(ends))
