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

from attn_fuzz.backends.kernel import AttentionOptions, UnsupportedCase
from attn_fuzz.backends.metadata import VarlenMetadata, slots
from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.poison import filler, finite_filler
from attn_fuzz.execution.sides import Side, side_of
from attn_fuzz.reference.answer import SHARED_DIMENSIONS, Inputs
from attn_fuzz.reference.case import FAR_MEMORIES
from attn_fuzz.reference.far_memory import FarMemory
from attn_fuzz.reference.memory import Placed, all_intact, bits, layout_of, place
from attn_fuzz.reference.transfer import transferred

_SUMS_STEP: Final = 32
"""Prefix sums begin at multiples of so many numbers: 128 bytes."""

_SIDES: Final = {"q": "q", "dout": "q", "k": "k", "v": "k", "dlse": "q"}


def side_of_result(name: str) -> str:
    """Whose rows a result has: those of ``q`` or of ``k``."""
    return "k" if name in ("dk", "dv") else "q"


_BY_ROWS: Final = ("sliced", "strided", "misaligned")
"""With these the LSE's gradient lies row by row, as that of an LSE that somebody has transposed."""


def _sums(batch: CallBatch, device: torch.device) -> tuple[torch.Tensor, list[VarlenMetadata]]:
    """(all prefix sums in one allocation, the metadata of each call, whose prefix sums are parts of it).

    With gaps, so are the numbers of rows that each document has.
    """
    numbers: list[int] = []
    places: list[dict[str, slice]] = []
    case = batch.case
    sides = {"q": case.packed_lengths, "k": case.packed_key_lengths}
    for span in batch.spans:
        own: dict[str, slice] = {}
        for (side, lengths), gap in zip(sides.items(), case.gaps, strict=True):
            of_call = lengths[slice(*span)]
            told = {f"cu_seqlens_{side}": list(itertools.accumulate(slots(of_call, gap), initial=0))}
            if gap:
                told[f"seqused_{side}"] = list(of_call)
            for name, few in told.items():
                own[name] = slice(len(numbers), len(numbers) + len(few))
                numbers += few + [-1] * (-len(few) % _SUMS_STEP)
        places.append(own)
    every = transferred(numbers, device, torch.int32)
    made = [
        VarlenMetadata(
            lengths_q=sides["q"][slice(*span)],
            lengths_k=sides["k"][slice(*span)],
            device=every.device,
            gaps=case.gaps,
            loose_max_seqlen=case.loose_max_seqlen,
        ).lying_at(**{name: every[place] for name, place in own.items()})
        for span, own in zip(batch.spans, places, strict=True)
    ]
    return every, made


_FREE_FOR_FAR: Final = 16 << 30
"""Bytes of a GPU's memory: 2^31 numbers of float32 are half of them."""


def _needed_for_far(device: torch.device) -> int:
    """Bytes that have to be free: as much as it takes, and half of the device, for others work there, too."""
    return max(_FREE_FOR_FAR, torch.cuda.mem_get_info(device)[1] // 2)


def _free_of_cuda(device: torch.device) -> int:
    """Bytes that there are, those included that torch holds on to."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


class BatchTensors:
    """A batch's tensors in their places, ready for any number of runs.

    Args:
        batch: what will run.
        inputs: tensors of its packed case; those of another device are copied.
        device: where.
        spares: how many rows behind its last document each call is handed; none where empty.
        poison: what gaps, guard margins and rows behind the last document hold (execution/poison.py).
        finite_rest: rows behind the last document and between documents hold numbers whatever the poison.
    """

    def __init__(
        self,
        batch: CallBatch,
        inputs: Inputs,
        device: torch.device,
        spares: Sequence[int] = (),
        poison: str = "nan",
        *,
        finite_rest: bool = False,
    ) -> None:
        self.batch, self.device, self._fill = batch, device, filler(poison)
        self.spares = tuple(spares) or (0,) * len(batch.ends)
        case = batch.case
        rest = any((*self.spares, *case.gaps))
        self._rest = finite_filler(poison) if finite_rest and rest else self._fill
        """What rows of arenas hold that are nobody's."""
        self.sides = {
            "q": side_of(batch, case.packed_lengths, self.spares, device, case.gaps[0]),
            "k": side_of(batch, case.packed_key_lengths, self.spares, device, case.gaps[1]),
        }
        self._far = self._far_memory(inputs) if case.memory in FAR_MEMORIES else None
        self.placed = {name: self._place(name, x.to(device)) for name, x in inputs.named.items()}
        self.sums, self.metadata = _sums(batch, device)
        self._sums_before = self.sums.clone()
        self.options = AttentionOptions.of(case)

    @classmethod
    def of(
        cls,
        backend: Backend,
        batch: CallBatch,
        inputs: Inputs,
        device: torch.device,
        spares: Sequence[int] = (),
        poison: str = "nan",
    ) -> BatchTensors:
        """Those that a backend is given: with numbers where it says that it needs some."""
        finite = backend.kernel.capabilities_on(device.type).finite_rest
        return cls(batch, inputs, device, spares, poison, finite_rest=finite)

    def _far_memory(self, inputs: Inputs) -> FarMemory:
        """Where tensors lie whose rows or heads are far apart.

        Raises:
            UnsupportedCase: where there is no room for it, which is this machine's limit.
        """
        memory, device = self.batch.case.memory, self.device
        if device.type == "cuda" and (free := _free_of_cuda(device)) < (needed := _needed_for_far(device)):
            raise UnsupportedCase(f"memory {memory} asks for {needed >> 30} GiB, but {free >> 30} are free")
        shapes = {
            name: (self.sides[_SIDES[name]].rows, *x.shape[1:]) for name, x in inputs.named.items() if name != "dlse"
        }
        try:
            return FarMemory(memory, shapes, inputs.q.dtype, device)
        except OSError as error:
            raise UnsupportedCase(f"memory {memory} takes more than there is: {error}") from error

    def _place(self, name: str, x: torch.Tensor) -> Placed:
        if name == "dlse":
            return self._place_by_head(x)
        if self._far is not None:
            return self._far.place(name, self._arena(self.sides[_SIDES[name]], x, None), self._fill)
        memory = layout_of(name, self.batch.case.memory)
        shared = SHARED_DIMENSIONS.get(name) if memory == "broadcast" else None
        return place(self._arena(self.sides[_SIDES[name]], x, shared), memory, self._fill, shared)

    def _place_by_head(self, x: torch.Tensor) -> Placed:
        """The LSE's gradient ``[tokens, heads]`` as the LSE is, ``[heads, rows]``, between guard margins."""
        arena, memory = self.sides["q"].arena(x, self._rest), self.batch.case.memory
        if memory not in _BY_ROWS:
            return place(arena.T.contiguous(), "contiguous", self._fill)
        by_row = place(arena, memory, self._fill)
        return dataclasses.replace(by_row, tensor=by_row.tensor.T)

    def _arena(self, side: Side, x: torch.Tensor, shared: int | None) -> torch.Tensor:
        """All rows of the calls, and those that belong to none."""
        if shared == 0 and len(x):
            return x[:1].expand(side.rows, *x.shape[1:])
        return side.arena(x, self._rest)

    @functools.cached_property
    def of_calls(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each call's own rows of q, k, v and dout, spare ones included."""
        views = []
        for name in ("q", "k", "v", "dout"):
            side, whole = self.sides[_SIDES[name]], self.placed[name].tensor
            places = zip(side.begins, side.counts, self.spares, strict=True)
            views.append([whole.narrow(0, begin, count + spare) for begin, count, spare in places])
        return list(zip(*views, strict=True))

    def parted(self, name: str, index: int, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows that are documents', rows that are nobody's or None) of a call's result, by its name."""
        return self.sides[side_of_result(name)].parted(index, result, self.spares[index])

    @functools.cached_property
    def lse_gradients(self) -> list[torch.Tensor | None]:
        """Each call's own part of the LSE's gradient, ``[heads, rows]``, spare ones included; None without one."""
        if (placed := self.placed.get("dlse")) is None:
            return [None] * len(self.batch.ends)
        places = zip(self.sides["q"].begins, self.sides["q"].counts, self.spares, strict=True)
        return [placed.tensor.narrow(1, begin, count + spare) for begin, count, spare in places]

    def copy_in(self, other: BatchTensors) -> None:
        """Copies values and prefix sums of calls of the same sizes to where these lie, on the current stream."""
        for name, placed in self.placed.items():
            placed.tensor.copy_(other.placed[name].tensor)
        self.sums.copy_(other.sums)

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
            for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
                if (now := getattr(metadata, name)) is None:
                    continue
                place = now.storage_offset() - begin
                if not torch.equal(now, self._sums_before[place : place + len(now)]):
                    found.append(name)
        return found or ["memory behind cu_seqlens"]
