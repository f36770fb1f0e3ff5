"""A document of every call alone, and with those of other calls (attn_fuzz/oracle/relations/company.py)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from attn_fuzz.batch.batch_run import COMPANY, BatchRun, Results
from attn_fuzz.batch.verdicts import other_bits
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.oracle.relations.company import PASSES, asked_of, chosen, counted, promised
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case

_SIZES: Final = (1, 2, 5)
"""Documents in a call: each alone, with one other, with four others; in its own call each has been before."""

_SIZES_OF_SHAPES: Final = (1,)
"""The same of what compiles for shapes: others would be compiled once more for each company."""


def company(batch_run: BatchRun) -> None:
    """Documents of all calls, one of each, by ones, twos and fives: the same bits where promised, and budgets."""
    stated = batch_run.backend.kernel.capabilities_on(batch_run.device.type)
    if not asked_of(batch_run.case, batch_run.backend, batch_run.device.type):
        return
    chosen_few = _Chosen.of(batch_run, layouts=bool(stated.layouts))
    if chosen_few is None:
        return
    runs = [chosen_few.drawn, *(chosen_few.run(size) for size in (_SIZES_OF_SHAPES if stated.layouts else _SIZES))]
    for run in runs[1:]:
        batch_run.hold(chosen_few.among(run))
    moved = {name: chosen_few.moved(name, runs) for name in batch_run.promised if name in chosen_few.drawn}
    _count(batch_run, moved, len(chosen_few.places))
    wrong = torch.zeros(len(batch_run.case.packed_lengths), dtype=torch.bool, device=batch_run.device)
    for name, found in moved.items():
        if promised(stated, name):
            wrong[chosen_few.owner] |= found
    batch_run.accuse(COMPANY, wrong)


def _count(batch_run: BatchRun, moved: dict[str, torch.Tensor], documents: int) -> None:
    """How often documents are the same, of results that have the same bits in every run of one call."""
    for which, names in PASSES.items():
        some = [moved[name] for name in names if name in moved]
        if some:
            batch_run.counted[counted(which)] = torch.tensor(documents)
            batch_run.counted[counted(which, moved=True)] = torch.stack(some).any(0).sum()


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """One document of each call, of those that have one that is taken alone, too."""

    batch_run: BatchRun
    small: Case
    """All of these documents."""
    places: list[int]
    """Which documents of the batch they are."""
    calls: list[int]
    """Which calls they are of."""

    @classmethod
    def of(cls, batch_run: BatchRun, *, layouts: bool) -> _Chosen | None:
        places, calls, kind = list[int](), list[int](), batch_run.device.type
        for index, (begin, _) in enumerate(batch_run.batch.spans):
            call = batch_run.batch.call(index)
            place = chosen(call, layouts=layouts)
            single = None if place is None else subset(call, [place])
            if place is not None and single is not None and batch_run.backend.refusal(single, kind) is None:
                places.append(begin + place)
                calls.append(index)
        small = subset(batch_run.case, places) if places else None
        return None if small is None else cls(batch_run, small, places, calls)

    @functools.cached_property
    def owner(self) -> torch.Tensor:
        """int64 ``[documents]``: ``places``, on the device."""
        return torch.tensor(self.places).to(self.batch_run.device)

    @functools.cached_property
    def _sides(self) -> dict[str, torch.Tensor]:
        """By side: where in the batch each row of those documents is, int64."""
        every, own = (RowIndex(case, self.batch_run.device) for case in (self.batch_run.case, self.small))
        return {
            "q": every.begins[self.owner][own.owner] + own.position,
            "k": every.key_begins[self.owner][own.key_owner] + own.key_position,
        }

    def rows(self, name: str) -> torch.Tensor:
        """The same of a result or an input."""
        return self._sides["k" if name in ("k", "v", "dk", "dv") else "q"]

    def _of_own(self, tensors: Mapping[str, torch.Tensor]) -> Results:
        return {name: x.index_select(0, self.rows(name)) for name, x in tensors.items()}

    @functools.cached_property
    def drawn(self) -> Results:
        """What they gave in the calls that were drawn."""
        return self._of_own(self.batch_run.first)

    def run(self, size: int) -> Results:
        """What they give in calls of so many; what they gave before where a call brings nothing."""
        batch = CallBatch(self.small, tuple(self._ends(size)))
        tensors = self.batch_run.load(batch, Inputs(**self._of_own(self.batch_run.inputs().named)))
        found = self.batch_run.run_batch(tensors, self.batch_run.other_poison, every=True)
        results = {name: x for name, x in found.results.items() if name in self.drawn}
        for index in (*found.broken, *found.refused):
            begin, end = batch.spans[index]
            for name, x in results.items():
                lengths = self.small.packed_key_lengths if name in ("dk", "dv") else self.small.packed_lengths
                own = slice(sum(lengths[:begin]), sum(lengths[:end]))
                x[own] = self.drawn[name][own]
        # Calls are told by their numbers in the batch that was drawn.
        broken = found.broken.items()
        found.broken = {self.calls[of]: words for index, words in broken for of in range(*batch.spans[index])}
        found.incomplete = {self.calls[of] for index in found.incomplete for of in range(*batch.spans[index])}
        found.refused = {}
        return results

    def _ends(self, size: int) -> Iterator[int]:
        """Where calls of so many documents end; those that are not taken together are taken one by one."""
        count, kind = len(self.places), self.batch_run.device.type
        for begin in range(0, count, size):
            end = min(begin + size, count)
            call = subset(self.small, range(begin, end)) if size > 1 else None
            together = call is not None and self.batch_run.backend.refusal(call, kind) is None
            yield from (end,) if together else range(begin + 1, end + 1)

    def among(self, results: Results) -> Results:
        """The results of all calls that are asked, with these in their places."""
        first = self.batch_run.first
        return {name: first[name].index_copy(0, self.rows(name), x) for name, x in results.items()}

    def moved(self, name: str, runs: Sequence[Results]) -> torch.Tensor:
        """Documents that have other bits of a result in some run than alone, bool ``[documents]``."""
        drawn, alone, *others = runs
        return torch.stack([other_bits(self.small, alone, other, [name]) for other in (drawn, *others)]).any(0)
