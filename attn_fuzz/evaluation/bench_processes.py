"""Batches of several processes that share a device, beside the bare kernel of as many on the same calls.

All of them judge calls of one layout and ask what campaigns ask, each beginning at another question. A campaign draws
its layouts and options, longer documents and wider heads among them: ``bench`` measures that, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from typing import Any, Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.batch.judge import SCHEDULE, judge
from attn_fuzz.campaign import new_process
from attn_fuzz.evaluation.bench_calls import cut_up
from attn_fuzz.evaluation.bench_plan import PLANS, Plan, layout
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import run_batch
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.process import set_apart, set_up_process
from attn_fuzz.execution.timing import idle
from attn_fuzz.reference.answer import kernel_inputs

STARTED_S: Final = 180.0
"""How long all processes may take to get ready for a backend."""


class BenchError(Exception):
    """A process of the measurement was lost."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every process measures, in this order."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    seconds: float
    device: str
    plan: Plan


def _rate(work: Callable[[int], int], first: int, seconds: float, device: torch.device) -> float:
    """Calls per second of what was done within so many seconds; what was begun then goes on, and does not count."""
    done, started, last = 0, time.monotonic(), 0.0
    for turn in itertools.count(first):
        calls = work(turn)
        idle(device)
        taken = time.monotonic() - started
        if taken > seconds:
            # A batch longer than that is all there is.
            return done / last if done else calls / taken
        done, last = done + calls, taken
    raise AssertionError


def _measure(index: int, job: _Job, barrier: Barrier, results: Any) -> None:
    set_apart()
    set_up_process(job.device)
    device = torch.device(job.device)
    for name in job.names:
        backend = registry.load(name)
        batch = cut_up(layout(job.plan, job.plan.batch_documents, seed=index), seed=index)
        tensors_of_calls = BatchTensors(batch, kernel_inputs(batch.case, device), device)

        def whole(turn: int) -> int:
            judge(batch, backend, device, SCHEDULE[turn % len(SCHEDULE)])  # noqa: B023
            return len(batch.ends)  # noqa: B023

        def bare(turn: int) -> int:
            run_batch(tensors_of_calls, backend, "none")  # noqa: B023
            return len(batch.ends)  # noqa: B023

        for work in (whole, bare):
            work(0)
        for count in job.counts:
            for kind, work in (("cases_per_s", whole), ("bare_calls_per_s", bare)):
                barrier.wait(STARTED_S)
                if index < count:
                    results.put((name, count, kind, _rate(work, 5 * index, job.seconds, device)))


def processes_of(
    names: Sequence[str], counts: Sequence[int], seconds: float, device: str, plan: Plan, say: Callable[[str], None]
) -> dict[str, dict[str, dict[str, float]]]:
    """Calls per second of all processes together, by backend and number of processes.

    Args:
        names: backends, each of which takes the plan's layout.
        counts: how many processes, tried in turn.
        seconds: how long each is measured.
        device: ``cpu`` or ``cuda``.
        plan: the layout.
        say: told what was measured.

    Raises:
        BenchError: when a process is lost.
    """
    context = new_process.context()
    job = _Job(tuple(names), tuple(counts), seconds, device, plan)
    barrier, results = context.Barrier(max(counts)), context.Queue()
    workers = [new_process.start(_measure, (index, job, barrier, results), {}) for index in range(max(counts))]
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for name, count in itertools.product(names, counts):
            rates = {"cases_per_s": 0.0, "bare_calls_per_s": 0.0}
            for _ in range(2 * count):
                told, number, kind, rate = _next(results, workers)
                if (told, number) != (name, count):
                    raise BenchError(f"figures of {told} came while {name} was measured")
                rates[kind] += rate
            found.setdefault(name, {})[str(count)] = rates
            say(f"{name}, {count} processes: {rates['cases_per_s']:,.0f} cases/s in batches, "
                f"{rates['bare_calls_per_s']:,.0f} bare")  # fmt: skip
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return found


def _next(results: Any, workers: Sequence[Any]) -> tuple[str, int, str, float]:
    while True:
        try:
            told: tuple[str, int, str, float] = results.get(timeout=1.0)
            return told
        except queue.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                raise BenchError("a process of the measurement died: see its own words above") from None


def bench_processes(device: str, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """The JSON object of ``bench --processes --json``."""
    plan = PLANS[device]
    # Of calls that are there already: a campaign begins with few and draws them.
    counts, seconds = plan.batch_processes, plan.batch_seconds / 2
    case = layout(plan, plan.batch_documents)
    names = [name for name in names if registry.load(name).refusal(case, device) is None]
    return {
        "device": device,
        "environment": environment(device),
        "plan": dataclasses.asdict(plan),
        "processes": processes_of(names, counts, seconds, device, plan, say),
    }
