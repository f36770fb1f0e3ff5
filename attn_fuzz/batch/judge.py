"""A batch from end to end: run its calls, judge every document of every call, and wait for the device once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.batch_run import NAMES, BatchRun
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.layer_judge import judge_layer_calls, moving_layers
from attn_fuzz.batch.questions import QUESTIONS
from attn_fuzz.batch.verdicts import COLUMNS, largest_z, other_bits
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.inferred import TIMES, promises
from attn_fuzz.oracle.deviations import LIMIT, limit
from attn_fuzz.reference.answer import KERNEL_TENSORS

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
    Question("nan", "merging"),
    Question("nan", "other scale"),
    Question("finite", "merging"),
    Question("finite", "company"),
)
"""Of every campaign, in turn."""

LAUNCHED: Final = (Question("nan", "ordered by streams"), Question("finite", "replayed alike"))
"""The same, where there are streams and graphs."""

SELDOM: Final = Question("finite", "compiled alike")
"""Asked once in many rounds of the others: torch compiles for seconds, where a batch takes a second or less."""

_ROUNDS: Final = {"cuda": 10, "cpu": 18}
"""Of the others' turns: some percent of the time go to what comes once in them. With it there are as many turns as have
no divisor in common with the places of sweeps."""


def schedule_on(kind: str) -> tuple[Question, ...]:
    """What is asked of kernel calls on a kind of device, ``cpu`` or ``cuda``, in turn."""
    others, half = (*SCHEDULE, *LAUNCHED) if kind == "cuda" else SCHEDULE, _ROUNDS[kind] // 2
    return (*others * half, SELDOM, *others * half)


SHARE: Final = 0.5
"""Of a batch's calls that are asked more than the budgets. A further run costs as much as the drawn values' own, and
more calls of other kinds are worth more."""


def usually_asked(batch: CallBatch) -> int:
    """Of how many of a batch's calls, from the first on, campaigns ask more than the budgets."""
    return math.ceil(len(batch.ends) * SHARE)


def judge(
    batch: CallBatch,
    backend: Backend,
    device: torch.device,
    question: Question = SCHEDULE[0],
    beat: Callable[[], None] = lambda: None,
    asked: int | None = None,
) -> Judged:
    """Runs every call with drawn values, and as the question has it, from poisoned memory; judges all of it.

    Every document's results are held to the budget, element by element and row by row, and what is asked of the
    first calls to what is exactly right.

    Args:
        batch: the calls.
        backend: what runs them.
        device: where.
        question: what is asked.
        beat: called before every call of every run.
        asked: of how many calls, from the first on; None for all, as always where something is compiled for a few of
            them: the others then take no time.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    if batch.case.level == "layer":
        return judge_layer_calls(batch, backend, device, question, beat, asked=asked)
    asked = len(batch.ends) if asked is None or question.asked == SELDOM.asked else asked
    batch_run = BatchRun(batch, backend, device, question.poison, asked, beat)
    z = torch.zeros(len(batch.case.packed_lengths), len(NAMES), dtype=torch.float64, device=device)
    first = batch_run.runs[0]
    if len(first.broken | first.refused) < len(batch.ends):
        # Of calls none of which came back there is nothing to ask.
        QUESTIONS[question.asked](batch_run)
        _fill(z, batch_run)
    touched = torch.stack([each.changed() for each in batch_run.placed]).any()
    # The one transfer: everything before it was only queued.
    counts = [count.to(device).double() for count in batch_run.counted.values()]
    flat = torch.cat([z.flatten(), torch.stack([touched.double(), *counts])]).cpu()
    numbers = flat[z.numel() :].tolist()
    broken: dict[int, str] = {}
    refused: dict[int, str] = {}
    for batch_result in batch_run.runs:
        broken = batch_result.broken | broken
        refused |= batch_result.refused
    return Judged(
        batch,
        flat[: z.numel()].view(z.shape),
        question,
        broken,
        refused,
        touched=bool(numbers[0]),
        paths=frozenset().union(*(batch_result.paths for batch_result in batch_run.runs)),
        spares=batch_run.spares,
        asked=asked,
        symptoms=batch_run.symptoms,
        counted={name: int(count) for name, count in zip(batch_run.counted, numbers[1:], strict=True)},
        missing=frozenset(KERNEL_TENSORS) - first.results.keys(),
        incomplete=frozenset().union(*(batch_result.incomplete for batch_result in batch_run.runs)),
    )


def _fill(z: torch.Tensor, batch_run: BatchRun) -> None:
    """Writes down what is wrong with each document, ``[documents, len(NAMES)]``, in units of ``Judged.z``."""
    case = batch_run.whole
    by_budget = largest_z(case, batch_run.drawn, batch_run.profile, batch_run.held).amax(0)
    for deviations in batch_run.deviations:
        first = by_budget[: len(deviations)]
        torch.maximum(first, deviations, out=first)
    z[:, : len(COLUMNS)] = by_budget * (LIMIT / limit(case))
    for name, wrong in batch_run.accused.items():
        z[: len(wrong), NAMES.index(name)] = wrong


def moving(batch: CallBatch, backend: Backend, device: torch.device, poison: str) -> torch.Tensor:
    """Documents whose results have other bits from one run to the next, of results that are promised by no statement.

    Args:
        batch: the calls.
        backend: what runs them.
        device: where.
        poison: contents of unwritten memory, the same in each run.

    Returns:
        bool ``[documents]`` on the CPU.
    """
    if batch.case.level == "layer":
        return moving_layers(batch, backend, device, poison)
    batch_run = BatchRun(batch, backend, device, poison, len(batch.ends), lambda: None)
    names = [name for name in batch_run.promised if not promises(backend, str(device), name)]
    found = torch.zeros(len(batch.case.packed_lengths), dtype=torch.bool, device=device)
    for _ in range(TIMES - 1 if names else 0):
        found |= other_bits(batch.case, batch_run.first, batch_run.run(batch_run.tensors_of_calls, poison), names)
    return found.cpu()
