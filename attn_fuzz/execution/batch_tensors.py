"""The tensors of a batch's calls in their places: arenas between guard margins, rows of NaN between calls.

A case by itself is a batch of one call, whose tensors have an arena each, and no gap.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Final

import torch

from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.poison import filler
from attn_fuzz.reference.answer import SHARED_DIMENSIONS, Inputs
from attn_fuzz.reference.memory import Placed, all_intact, bits, layout_of, place

_STEP: Final = 64
"""Calls begin at multiples of so many rows, of whatever size: aligned as tensors of their own are."""

_SUMS_STEP: Final = 32
"""Prefix sums begin at multiples of so many numbers: 128 bytes."""

_SIDES: Final = {"q": "q", "dout": "q", "k": "k", "v": "k", "dlse": "q"}

_BY_ROWS: Final = ("sliced", "strided", "misaligned")
"""With these the LSE's gradient lies row by row, as that of an LSE that somebody has transposed."""


@dataclasses.dataclass(frozen=True)
class Side:
    """Where the rows of one side of the calls lie."""

    begins: tuple[int, ...]
    """First row of each call in the arena."""
    counts: tuple[int, ...]
    """Rows of each call."""
    rows: int
    """Of the arena, gaps included."""
    places: torch.Tensor | None
    """int64 ``[tokens]``: row in the arena of each row of the packed case; None where they are the same."""

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


def side_of(batch: CallBatch, lengths: tuple[int, ...], spares: Sequence[int], device: torch.device) -> Side:
    """Where the rows of calls lie whose documents have so many; each has so many spare ones behind its last."""
    counts = [sum(lengths[slice(*span)]) for span in batch.spans]
    begins, row = [], 0
    for count, spare in zip(counts, spares, strict=True):
        begins.append(row)
        # A row at least between calls belongs to none; behind the last one there is a guard margin.
        end, row = row + count + spare, row + ((count + spare) // _STEP + 1) * _STEP
    if len(counts) == 1:
        return Side(tuple(begins), tuple(counts), end, None)
    gaps = [begin - packed for begin, packed in zip(begins, itertools.accumulate(counts, initial=0))]
    numbers = torch.tensor([counts, gaps], dtype=torch.int64).to(device, non_blocking=True)
    tokens = sum(counts)
    shifts = torch.repeat_interleave(numbers[1], numbers[0], output_size=tokens)
    return Side(tuple(begins), tuple(counts), end, shifts + torch.arange(tokens, device=device))


def _sums(batch: CallBatch, device: torch.device) -> tuple[torch.Tensor, list[VarlenMetadata]]:
    """(all prefix sums in one allocation, the metadata of each call, whose prefix sums are parts of it)."""
    numbers: list[int] = []
    places: list[tuple[int, int]] = []
    lengths_q, lengths_k = batch.case.packed_lengths, batch.case.packed_key_lengths
    for span in batch.spans:
        for lengths in (lengths_q, lengths_k):
            own = list(itertools.accumulate(lengths[slice(*span)], initial=0))
            places.append((len(numbers), len(numbers) + len(own)))
            numbers += own + [-1] * (-len(own) % _SUMS_STEP)
    every = torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)
    made = [
        VarlenMetadata.of_sums(
            lengths_q[slice(*span)], lengths_k[slice(*span)], every[slice(*sums_q)], every[slice(*sums_k)]
        )
        for span, sums_q, sums_k in zip(batch.spans, places[::2], places[1::2], strict=True)
    ]
    return every, made


class BatchTensors:
    """A batch's tensors in their places, ready for any number of runs.

    Args:
        batch: what will run.
        inputs: tensors of its packed case; those of another device are copied.
        device: where.
        spares: how many rows behind its last document each call is handed; none where empty.
        poison: what gaps, guard margins and rows behind the last document hold (execution/poison.py).
    """

    def __init__(
        self,
        batch: CallBatch,
        inputs: Inputs,
        device: torch.device,
        spares: Sequence[int] = (),
        poison: str = "nan",
    ) -> None:
        self.batch, self.device, self._fill = batch, device, filler(poison)
        self.spares = tuple(spares) or (0,) * len(batch.ends)
        case = batch.case
        self.sides = {
            "q": side_of(batch, case.packed_lengths, self.spares, device),
            "k": side_of(batch, case.packed_key_lengths, self.spares, device),
        }
        self.placed = {name: self._place(name, x.to(device)) for name, x in inputs.named.items()}
        self.sums, self.metadata = _sums(batch, device)
        self._sums_before = self.sums.clone()
        self.options = AttentionOptions.of(case)

    def _place(self, name: str, x: torch.Tensor) -> Placed:
        if name == "dlse":
            return self._place_by_head(x)
        memory = layout_of(name, self.batch.case.memory)
        shared = SHARED_DIMENSIONS.get(name) if memory == "broadcast" else None
        return place(self._arena(self.sides[_SIDES[name]], x, shared), memory, self._fill, shared)

    def _place_by_head(self, x: torch.Tensor) -> Placed:
        """The LSE's gradient ``[tokens, heads]`` as the LSE is, ``[heads, rows]``, between guard margins."""
        arena, memory = self.sides["q"].arena(x, self._fill), self.batch.case.memory
        if memory not in _BY_ROWS:
            return place(arena.T.contiguous(), "contiguous", self._fill)
        by_row = place(arena, memory, self._fill)
        return dataclasses.replace(by_row, tensor=by_row.tensor.T)

    def _arena(self, side: Side, x: torch.Tensor, shared: int | None) -> torch.Tensor:
        """All rows of the calls, and those that belong to none."""
        if shared == 0 and len(x):
            return x[:1].expand(side.rows, *x.shape[1:])
        return side.arena(x, self._fill)

    @functools.cached_property
    def of_calls(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each call's own rows of q, k, v and dout, spare ones included."""
        views = []
        for name in ("q", "k", "v", "dout"):
            side, whole = self.sides[_SIDES[name]], self.placed[name].tensor
            places = zip(side.begins, side.counts, self.spares, strict=True)
            views.append([whole.narrow(0, begin, count + spare) for begin, count, spare in places])
        return list(zip(*views, strict=True))

    @functools.cached_property
    def lse_gradients(self) -> list[torch.Tensor | None]:
        """Each call's own part of the LSE's gradient, ``[heads, rows]``, spare ones included; None without one."""
        if (placed := self.placed.get("dlse")) is None:
            return [None] * len(self.batch.ends)
        places = zip(self.sides["q"].begins, self.sides["q"].counts, self.spares, strict=True)
        return [placed.tensor.narrow(1, begin, count + spare) for begin, count, spare in places]

    def changed(self) -> torch.Tensor:
        """Whether any input, gap, guard margin or prefix sum has lost its bits: bool scalar on the device."""
        moved = [(bits(item.storage) != item.before).any() for item in self.placed.values()]
        return torch.stack([*moved, (self.sums != self._sums_before).any()]).any()

    def changes(self) -> list[str]:
        """The same in words: which tensors, and whether their values or the margins around them."""
        if all_intact([*self.placed.values()], [(self.sums, self._sums_before)]):
            return []
        found = [f"{what} of {name}" for name, item in self.placed.items() if (what := item.changed())]
        begin = self.sums.storage_offset()
        for metadata in self.metadata:
            for name, now in (("cu_seqlens_q", metadata.cu_seqlens_q), ("cu_seqlens_k", metadata.cu_seqlens_k)):
                place = now.storage_offset() - begin
                if not torch.equal(now, self._sums_before[place : place + len(now)]):
                    found.append(name)
        return found or ["memory behind cu_seqlens"]
