"""A batch from end to end: run its calls, judge every document of every call, and wait for the device once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.batch_run import APART, NAMES, PROBED, TAILS, BatchRun
from attn_fuzz.batch.packed import promised
from attn_fuzz.batch.questions import QUESTIONS
from attn_fuzz.batch.verdicts import COLUMNS, largest_z, other_bits
from attn_fuzz.execution.inferred import TIMES, promises
from attn_fuzz.generation.calls import CallBatch
from attn_fuzz.oracle.deviations import LIMIT, limit
from attn_fuzz.oracle.symptoms import DeadRowsNotZero, NotIsolated, PoisonLeaked, Symptom, WrongSpread, wrong_tensor
from attn_fuzz.reference.case import Case

_EXACT: Final[dict[str, type[Symptom]]] = {"bits": PoisonLeaked, APART: NotIsolated, TAILS: DeadRowsNotZero}


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a backend made of a batch."""

    batch: CallBatch
    z: torch.Tensor
    """float64 ``[documents, len(NAMES)]`` on the CPU; inf where something exact is wrong."""
    broken: dict[int, str]
    """Calls that raised or gave something else than was asked for, in words."""
    refused: dict[int, str]
    """Calls that the backend refused."""
    touched: bool
    """Some input, gap or prefix sum has other bits than before; nobody knows which call's work that was."""
    paths: frozenset[str]
    turn: Question
    """What was asked."""
    spares: tuple[int, ...]
    """Rows behind the last document that the first calls were handed in some run."""
    asked: int
    """Of how many calls, from the first on."""
    symptoms: Mapping[str, type[Symptom]]
    """What the probe calls a result that fails it."""

    def call(self, index: int) -> Case:
        """One of the calls as a case of its own, such as the case mode may show to fail."""
        small = self.batch.call(index)
        return small.replace(capacity=self.spares[index]) if index < len(self.spares) else small

    def symptom(self, name: str) -> type[Symptom]:
        """What a call is accused of whose largest deviation is in that column of ``NAMES``."""
        if name in PROBED:
            return self.symptoms[name.split()[0]]
        return _EXACT.get(name) or (WrongSpread if name.endswith("-rows") else wrong_tensor(name))

    def worst(self) -> list[tuple[float, str]]:
        """Of every call: the largest deviation in units in which the verdict is at LIMIT, and whose it is."""
        found = []
        for index, (begin, end) in enumerate(self.batch.spans):
            if index in self.broken:
                found.append((torch.inf, self.broken[index]))
                continue
            own = self.z[begin:end]
            if index in self.refused or not own.numel():
                found.append((0.0, ""))
                continue
            largest, column = own.amax(0).max(0)
            found.append((largest.item(), NAMES[int(column)]))
        return found

    def largest(self) -> dict[str, tuple[float, int]]:
        """Of each result: its largest deviation in the same units, and the call in which it was seen."""
        ends = torch.tensor(self.batch.ends)
        z = self.z.clone()
        for index in self.refused | self.broken:
            z[slice(*self.batch.spans[index])] = 0.0
        worst, places = z.max(0)
        calls = torch.searchsorted(ends, places, right=True).tolist()
        return {
            name: (z, index)
            for name, z, index in zip(NAMES, worst.tolist(), calls, strict=True)
            if name in COLUMNS and name != "bits"
        }

    def failing(self) -> list[int]:
        """Calls that are beyond the limit, worst first."""
        worst = self.worst()
        beyond = [index for index, (z, _) in enumerate(worst) if z > LIMIT]
        return sorted(beyond, key=lambda index: -worst[index][0])


def moving(batch: CallBatch, backend: Backend, device: torch.device, poison: str) -> list[int]:
    """Calls some of whose results have other bits from one run to the next, of those that are promised by no one.

    Args:
        batch: the calls.
        backend: what runs them.
        device: where.
        poison: contents of unwritten memory, the same in each run.
    """
    names = [name for name in promised(backend, device) if not promises(backend, str(device), name)]
    batch_run = BatchRun(batch, backend, device, poison, len(batch.ends), lambda: None)
    found = torch.zeros(len(batch.case.packed_lengths), dtype=torch.bool, device=device)
    for _ in range(TIMES - 1 if names else 0):
        found |= other_bits(batch.case, batch_run.first, batch_run.run(batch_run.tensors_of_calls, poison), names)
    return [index for index, span in enumerate(batch.spans) if found[slice(*span)].any()]


BY_BITS: Final = ("bits", APART)
"""Columns of ``NAMES`` that are about bits which must not move."""


class Question(NamedTuple):
    """What is asked of a batch, beside the budgets."""

    poison: str
    """Contents of unwritten memory when the drawn values run."""
    asked: str = ""
    """One of ``QUESTIONS``."""


SCHEDULE: Final = (
    Question("nan", "keys"),
    Question("finite", "inference"),
    Question("nan", "needle"),
    Question("finite", "again"),
    Question("nan", "keys"),
    Question("finite", "documents apart"),
    Question("nan", "every row"),
    Question("finite", "some gradients"),
    Question("nan", "keys"),
    Question("finite", "turned"),
    Question("nan", "swamping"),
    Question("finite", "second backward"),
    Question("nan", "keys"),
    Question("finite", "future apart"),
    Question("nan", "needle"),
    Question("finite", "capacity"),
    Question("nan", "other scale"),
)
"""Of every campaign, in turn."""

SHARE: Final = {"cuda": 0.5, "cpu": 1.0}
"""Of a batch's calls that are asked more than the budgets. A further run costs as much as the drawn values' own, and
more calls of other kinds are worth more; on CPUs batches are smaller, and the reference costs more than a run."""


def judge(
    batch: CallBatch,
    backend: Backend,
    device: torch.device,
    turn: Question = SCHEDULE[0],
    beat: Callable[[], None] = lambda: None,
    asked: int | None = None,
) -> Judged:
    """Runs every call with drawn values, and whatever else it is the turn of, from poisoned memory; judges all of it.

    Every document's results are held to the budget, element by element and row by row, and what the turn asks of the
    first calls (``SHARE``) to what is exactly right.

    Args:
        batch: the calls.
        backend: what runs them.
        device: where.
        turn: what is asked.
        beat: called before every call of every run.
        asked: of how many calls, from the first on; None for the usual share.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    if asked is None:
        asked = math.ceil(len(batch.ends) * SHARE[device.type])
    batch_run = BatchRun(batch, backend, device, turn.poison, asked, beat)
    QUESTIONS[turn.asked](batch_run)
    case = batch.case
    z = torch.zeros(len(case.packed_lengths), len(NAMES), dtype=torch.float64, device=device)
    by_budget = largest_z(case, batch_run.drawn, batch_run.profile, batch_run.held).amax(0)
    for deviations in batch_run.deviations:
        first = by_budget[: len(deviations)]
        torch.maximum(first, deviations, out=first)
    z[:, : len(COLUMNS)] = by_budget * (LIMIT / limit(case))
    for name, documents in batch_run.accused.items():
        z[: len(documents), NAMES.index(name)] = documents
    touched = torch.stack([each.changed() for each in batch_run.placed]).any()
    # The one transfer: everything before it was only queued.
    flat = torch.cat([z.flatten(), touched[None].double()]).cpu()
    broken: dict[int, str] = {}
    refused: dict[int, str] = {}
    for batch_result in batch_run.runs:
        broken = batch_result.broken | broken
        refused |= batch_result.refused
    paths = frozenset().union(*(batch_result.paths for batch_result in batch_run.runs))
    found = flat[:-1].view(z.shape)
    return Judged(
        batch, found, broken, refused, bool(flat[-1]), paths, turn, batch_run.spares, asked, batch_run.symptoms
    )
