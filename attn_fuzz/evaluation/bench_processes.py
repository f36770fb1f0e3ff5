"""Batches of several processes that share a device, beside the bare kernel or layer of as many on the same calls.

Of kernels all of them judge calls of one layout and ask what campaigns ask, each beginning at another question. A
campaign draws its layouts and options, longer documents and wider heads among them: ``bench`` measures that, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.synchronize import Barrier
from typing import Any, Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.batch.judge import judge, schedule_on, usually_asked
from attn_fuzz.campaign import new_process
from attn_fuzz.evaluation.bench_calls import cut_up
from attn_fuzz.evaluation.bench_layers import LayerBench
from attn_fuzz.evaluation.bench_plan import PLANS, Plan, layout
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import run_batch
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.process import leave_memory, set_apart, set_up_process
from attn_fuzz.execution.timing import idle
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case

STARTED_S: Final = 180.0
"""How long all processes may take to get ready for a backend."""


class BenchError(Exception):
    """A process of the measurement was lost."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process measures, in this order."""

    names: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    """By level, how many processes."""
    seconds: float
    device: str
    plan: Plan
    levels: tuple[str, ...]


RATES: Final = {
    "kernel": ("cases_per_s", "bare_calls_per_s"),
    "layer": ("layer_cases_per_s", "bare_layers_per_s"),
}
"""By level: calls that are judged, and bare ones."""

_LONGER: Final = {"layer_cases_per_s": 3.0}
"""By what is measured, how many times as long: a layer's batches take a second and more, and questions differ."""

Work = Callable[[int], int]
"""From a turn to how many calls were done in it."""


def _levels(name: str, levels: Sequence[str]) -> list[str]:
    return [level for level in levels if level in registry.load(name).levels]


def _works(name: str, level: str, job: Job, index: int) -> tuple[Work, Work]:
    """What is measured of a backend's level, as in ``RATES``."""
    backend, device = registry.load(name), torch.device(job.device)
    if level == "layer":
        layers = LayerBench(backend, device, index)
        return layers.judged, layers.bare
    batch = cut_up(layout(job.plan, job.plan.batch_documents, seed=index), seed=index)
    tensors_of_calls, schedule = (
        BatchTensors(batch, kernel_inputs(batch.case, device), device),
        schedule_on(device.type),
    )

    def judged(turn: int) -> int:
        judge(batch, backend, device, schedule[turn % len(schedule)], asked=usually_asked(batch))
        return len(batch.ends)

    def bare(turn: int) -> int:
        run_batch(tensors_of_calls, backend, "none")
        return len(batch.ends)

    return judged, bare


def _rate(work: Callable[[int], int], first: int, seconds: float, device: torch.device) -> float:
    """Calls per second of what was done within so many seconds; what was begun then goes on, and does not count."""
    done, started, last = 0, time.monotonic(), 0.0
    for turn in itertools.count(first):
        calls = work(turn)
        # As campaigns do, which share a GPU in the same way.
        leave_memory(device)
        idle(device)
        taken = time.monotonic() - started
        if taken > seconds:
            # A batch longer than that is all there is.
            return done / last if done else calls / taken
        done, last = done + calls, taken
    raise AssertionError


def _measure(index: int, job: Job, barrier: Barrier, results: Any) -> None:
    # Ctrl-C is for the parent, which keeps what was measured until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_apart()
    set_up_process(job.device)
    device = torch.device(job.device)
    for name in job.names:
        for level in _levels(name, job.levels):
            works = _works(name, level, job, index)
            for work in works:
                work(0)
            for count in job.counts[level]:
                for kind, work in zip(RATES[level], works, strict=True):
                    barrier.wait(STARTED_S)
                    if index < count:
                        seconds = job.seconds * _LONGER.get(kind, 1.0)
                        results.put((name, count, kind, _rate(work, 5 * index, seconds, device)))


def measure_processes(job: Job, say: Callable[[str], None], found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Measures how many calls per second all processes do together.

    Args:
        job: what is measured, of backends that take the plan's layout.
        say: told what was measured.
        found: gets the figures as they come, by backend and number of processes: an interruption keeps those before it.

    Raises:
        BenchError: when a process is lost.
    """
    context, most = new_process.context(), max(itertools.chain.from_iterable(job.counts.values()))
    barrier, results = context.Barrier(most), context.Queue()
    workers = [new_process.start(_measure, (index, job, barrier, results), {}) for index in range(most)]
    try:
        for name in job.names:
            for level, count in [(each, n) for each in _levels(name, job.levels) for n in job.counts[each]]:
                rates = dict.fromkeys(RATES[level], 0.0)
                for _ in range(len(rates) * count):
                    told, number, kind, rate = _next(results, workers)
                    if (told, number) != (name, count):
                        raise BenchError(f"figures of {told} came while {name} was measured")
                    rates[kind] += rate
                found.setdefault(name, {}).setdefault(str(count), {}).update(rates)
                together, alone = rates.values()
                say(f"{name}, {count} processes: {together:,.0f} {level} cases/s in batches, {alone:,.0f} bare")
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _next(results: Any, workers: Sequence[Any]) -> tuple[str, int, str, float]:
    while True:
        try:
            told: tuple[str, int, str, float] = results.get(timeout=1.0)
            return told
        except queue.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                raise BenchError("a process of the measurement died: see its own words above") from None


def bench_processes(
    device: str,
    names: Sequence[str],
    say: Callable[[str], None],
    levels: Sequence[str] = ("kernel", "layer"),
    numbers: Sequence[int] = (),
) -> dict[str, Any]:
    """The JSON object of ``bench --processes --json``; ``lost`` says why the rest was not measured, where one died.

    Args:
        device: where.
        names: of backends.
        say: told what was measured.
        levels: those of them that are measured.
        numbers: of processes; none for one and those of the plan.
    """
    plan = PLANS[device]
    case = layout(plan, plan.batch_documents)
    taking = [name for name in names if not _without_layout(name, case, device)]
    # Of calls that are there already: a campaign begins with few and draws them.
    every = {"kernel": plan.batch_processes, "layer": plan.layer_processes}
    counts = {level: tuple(dict.fromkeys(numbers or (1, *every[level]))) for level in levels}
    job = Job(tuple(taking), counts, plan.batch_seconds / 2, device, plan, tuple(levels))
    result: dict[str, Any] = {
        "device": device,
        "environment": environment(device),
        "plan": dataclasses.asdict(plan),
        "interrupted": False,
        "lost": "",
        "processes": {},
    }
    try:
        measure_processes(job, say, result["processes"])
    except KeyboardInterrupt:
        result["interrupted"] = True
    except BenchError as error:
        result["lost"] = str(error)
    return result


def _without_layout(name: str, case: Case, device: str) -> bool:
    """Whether a backend's kernel does not take the layout."""
    backend = registry.load(name)
    return "kernel" in backend.levels and backend.refusal(case, device) is not None
