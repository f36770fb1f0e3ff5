"""Where the rows of calls lie on one side, queries' or keys': arenas with rows between calls, and between documents."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Final

import torch

from attn_fuzz.backends.metadata import slots
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.reference.transfer import transferred

_STEP: Final = 64
"""Calls begin at multiples of so many rows, of whatever size: aligned as tensors of their own are."""


@dataclasses.dataclass(frozen=True)
class Between:
    """Rows between documents, which are nobody's."""

    gap: int
    """So many behind each document."""
    rows: torch.Tensor
    """int64 ``[documents * gap]``: where they lie in the arena, those behind the first document first."""
    documents: tuple[tuple[int, int], ...]
    """First document of each call, and one past its last."""
    tokens: tuple[int, ...]
    """Rows of the packed case before each call, and of all of it."""


@dataclasses.dataclass(frozen=True)
class Side:
    """Where the rows of one side of the calls lie."""

    begins: tuple[int, ...]
    """First row of each call in the arena."""
    counts: tuple[int, ...]
    """Rows of each call, those between its documents included."""
    rows: int
    """Of the arena, gaps included."""
    places: torch.Tensor | None
    """int64 ``[tokens]``: row in the arena of each row of the packed case; None where they are the same."""
    between: Between | None = None
    """Rows between documents, where there are some."""

    def arena(self, x: torch.Tensor, fill: float) -> torch.Tensor:
        """All rows of the calls from those of the packed case, and those that belong to none, which hold ``fill``."""
        if len(x) == self.rows:
            return x
        arena = x.new_full((self.rows, *x.shape[1:]), fill)
        if self.places is None:
            arena[: len(x)] = x
        else:
            arena[self.places] = x
        return arena

    def tokens_of(self, index: int) -> int:
        """Rows of a call that are documents'."""
        if self.between is None:
            return self.counts[index]
        return self.between.tokens[index + 1] - self.between.tokens[index]

    def parted(self, index: int, x: torch.Tensor, spare: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows that are documents', rows that are nobody's or None) of a call's result ``[rows, ...]``.

        One that has not as many rows as the call was handed is given back as it is.
        """
        count = self.counts[index]
        if len(x) != count + spare or not (spare or self.between):
            return x, None
        if self.between is None:
            return x[:count], x[count:]
        between, begin = self.between, self.begins[index]
        assert self.places is not None
        own = self.places[between.tokens[index] : between.tokens[index + 1]] - begin
        gaps = between.rows[slice(*(place * between.gap for place in between.documents[index]))] - begin
        behind = torch.arange(count, count + spare, device=x.device)
        return x.index_select(0, own), x.index_select(0, torch.cat([gaps, behind]))


def side_of(
    batch: CallBatch, lengths: tuple[int, ...], spares: Sequence[int], device: torch.device, gap: int = 0
) -> Side:
    """Where the rows of calls lie.

    Args:
        batch: the calls.
        lengths: rows of each document.
        spares: rows behind the last document of each call.
        device: where indices are needed.
        gap: rows behind each document that are nobody's.
    """
    counts = [sum(slots(lengths[slice(*span)], gap)) for span in batch.spans]
    begins, row = [], 0
    for count, spare in zip(counts, spares, strict=True):
        begins.append(row)
        # A row at least between calls belongs to none; behind the last one there is a guard margin.
        end, row = row + count + spare, row + ((count + spare) // _STEP + 1) * _STEP
    if gap:
        return _gapped(batch, lengths, Side(tuple(begins), tuple(counts), end, None), gap, device)
    if len(counts) == 1:
        return Side(tuple(begins), tuple(counts), end, None)
    gaps = [begin - packed for begin, packed in zip(begins, itertools.accumulate(counts, initial=0))]
    return Side(tuple(begins), tuple(counts), end, _moved(counts, gaps, device))


def _moved(counts: Sequence[int], shifts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where rows of runs come to lie, each run moved by so much: int64 ``[sum(counts)]``."""
    numbers = transferred([counts, shifts], device)
    tokens = sum(counts)
    every = torch.repeat_interleave(numbers[1], numbers[0], output_size=tokens)
    return every + torch.arange(tokens, device=device)


def _gapped(batch: CallBatch, lengths: tuple[int, ...], side: Side, gap: int, device: torch.device) -> Side:
    """The same side, with its rows between documents."""
    packed = list(itertools.accumulate(lengths, initial=0))
    starts: list[int] = []
    for begin, (first, last) in zip(side.begins, batch.spans, strict=True):
        starts += list(itertools.accumulate(slots(lengths[first:last], gap), initial=begin))[:-1]
    places = _moved(lengths, [start - before for start, before in zip(starts, packed, strict=False)], device)
    ends = torch.tensor([start + length for start, length in zip(starts, lengths, strict=True)], dtype=torch.int64)
    rows = (ends.to(device, non_blocking=True)[:, None] + torch.arange(gap, device=device)).flatten()
    tokens = (*(packed[first] for first, _ in batch.spans), packed[-1])
    return dataclasses.replace(side, places=places, between=Between(gap, rows, batch.spans, tokens))
