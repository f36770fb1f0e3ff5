"""The batch mode's speed, beside the bare kernel on the same calls, in one process and in several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judge import SELDOM, judge, schedule_on, usually_asked
from attn_fuzz.batch.judged import Question
from attn_fuzz.batch.verdicts import largest_z
from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.campaign.pool import Pool
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import run_batch
from attn_fuzz.execution.timing import median
from attn_fuzz.generation.calls import DOCUMENTS, LONGEST, draw_batch
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case

_ENOUGH: Final = 0.3
"""Seconds of each question: there are many."""

_SETTLED: Final = 0.4
"""Share of the time of several processes after which they count: all have started, and batches have grown."""


_MESSAGES: Final = 3
"""Of each process, once it has settled: fewer are of batches that were begun before."""

_PATIENCE: Final = 3


def cut_up(case: Case, seed: int = 0) -> CallBatch:
    """A packed case cut into calls of as many documents as those of campaigns have."""
    random, ends = Random(seed), [0]
    while ends[-1] < len(case.packed_lengths):
        ends.append(min(ends[-1] + random.choice(DOCUMENTS), len(case.packed_lengths)))
    return CallBatch(case, tuple(ends[1:]))


def batch_of(case: Case, backend: Backend, device: torch.device) -> dict[str, float]:
    """Cases per second of one process, and where their time goes, in seconds per case.

    Args:
        case: documents of one configuration, which are cut into calls.
        backend: what runs them.
        device: where.
    """
    batch, kind = cut_up(case), device.type
    count = len(batch.ends)
    # What is asked of a batch changes from one to the next.
    schedule = schedule_on(kind)

    def judged(asks: Question) -> Callable[[], object]:
        return lambda: judge(batch, backend, device, asks, asked=usually_asked(batch))

    each = {asks: median(judged(asks), device, enough=_ENOUGH) for asks in dict.fromkeys(schedule)}
    checked = _mean(each, schedule)
    usual = _mean(each, [asks for asks in schedule if asks != SELDOM])
    inputs = kernel_inputs(batch.case, device)
    tensors_of_calls = BatchTensors(batch, inputs, device)
    bare = median(lambda: run_batch(tensors_of_calls, backend, "none"), device)
    run = median(lambda: run_batch(tensors_of_calls, backend, "nan"), device)
    placing = median(lambda: BatchTensors(batch, kernel_inputs(batch.case, device), device), device)
    results, profile = run_batch(tensors_of_calls, backend, "none").results, backend.kernel.profile_on(kind)
    reference = median(lambda: largest_z(batch.case, inputs, profile, [results]), device)
    domain = Domain.of(backend.kernel.capabilities_on(kind), kind)
    sweep, random = Sweep(LONGEST[kind][0], 0), Random(0)
    drawing = median(lambda: draw_batch(random, sweep, backend, domain, count), torch.device("cpu"))
    return {
        "calls": count,
        "cases_per_s": count / (checked + drawing),
        # What torch compiles takes as long for a batch of any size, and campaigns' are larger.
        "cases_per_s_uncompiled": count / (usual + drawing),
        "documents_per_s": len(batch.case.packed_lengths) / (checked + drawing),
        "over_bare": (checked + drawing) / bare,
        "bare_s_per_case": bare / count,
        "drawing_s_per_case": drawing / count,
        "placing_s_per_case": placing / count,
        "a_run_s_per_case": run / count,
        "reference_and_budget_s_per_case": reference / count,
    }


def _mean(each: Mapping[Question, float], asked: Sequence[Question]) -> float:
    """Seconds of a batch, where what is asked changes from one to the next."""
    return sum(each[asks] for asks in asked) / len(asked)


def batches_shared_of(name: str, device: str, processes: int, seconds: float) -> float | None:
    """Calls per second that so many processes judge on one device, as a campaign draws them.

    One process compiles what there is to compile first, and is not counted: those that follow find it on the disk.
    Where too little came back within the time, because processes were still starting, there is more time once.

    Returns:
        None where there was too little even then.
    """
    _messages(name, device, 1, seconds / 2)
    for patience in (1, _PATIENCE):
        if (rate := settled_rate(_messages(name, device, processes, patience * seconds), processes)) is not None:
            return rate
    return None


def _messages(name: str, device: str, processes: int, seconds: float) -> list[tuple[float, int]]:
    """Each message of so many processes: when it came, and how many cases there had been by then."""
    jobs = [
        Assignment(backend=name, device=device, seed=20 + index, levels=("kernel",), seconds=seconds, mode="batch")
        for index in range(processes)
    ]
    seen: list[tuple[float, int]] = []

    def note(tallies: dict[str, Tally]) -> None:
        seen.append((time.monotonic(), tallies[name].cases))

    Pool(jobs, processes, note, lambda finding: None).run()
    return seen


def settled_rate(seen: Sequence[tuple[float, int]], processes: int) -> float | None:
    """Cases per second of processes that have settled, or None where they have not said enough since.

    Args:
        seen: (when, cases until then) of each message.
        processes: how many there were.
    """
    begin = seen[0][0] + _SETTLED * (seen[-1][0] - seen[0][0]) if seen else 0.0
    settled = [(at, cases) for at, cases in seen if at >= begin]
    if len(settled) < _MESSAGES * processes:
        return None
    (first, before), (last, after) = settled[0], settled[-1]
    return (after - before) / (last - first) if last > first and after > before else None
