"""The case mode's speed: one process, several, and a plain pytest loop beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign.messages import Assignment, Finished, Message
from attn_fuzz.campaign.pool import Pool
from attn_fuzz.campaign.worker import work
from attn_fuzz.evaluation import plain_suite
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.execution.runner import KernelCall
from attn_fuzz.execution.timing import now, once
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case

_WARM_UP: Final = 10


def bare(case: Case, backend: Backend, device: torch.device) -> Callable[[], object]:
    """The kernel's own forward and backward on a case's tensors, and nothing else."""
    call = KernelCall(backend, case, kernel_inputs(case, device), "nan", device)

    def run() -> None:
        call.forward()
        call.backward()

    return run


def cases_of(name: str, device: str, cases: int, count: int) -> dict[str, float]:
    """Cases and documents per second of one process, all checks on, with what its generation and kernels take.

    Args:
        name: of the backend.
        device: where.
        cases: that are examined, after a few that do not count.
        count: cases drawn to time their generation and their bare kernels.
    """
    messages: list[Message] = []
    place = torch.device(device)

    def examined(number: int, seed: int) -> None:
        work(Assignment(backend=name, device=device, seed=seed, levels=("kernel",), cases=number), messages.append)

    examined(_WARM_UP, 2)
    taken = once(lambda: examined(cases, 1), place)
    last = messages[-1]
    if not isinstance(last, Finished) or not last.tally.cases:
        return {"cases_per_s": 0.0, "documents_per_s": 0.0}
    backend = registry.load(name)
    started = now(place)
    every = drawn(backend, 1, count, device=place.type)
    drawing = (now(place) - started) / max(len(every), 1)
    kernels = []
    for case in (case for case in every if case.level == "kernel"):
        alone = bare(case.replace(capacity=0, memory="contiguous"), backend, place)
        try:
            alone()
        except (RuntimeError, UnsupportedCase, NotImplementedError):
            continue
        kernels.append(once(alone, place))
    return {
        "cases_per_s": last.tally.cases / taken,
        "documents_per_s": last.tally.documents / taken,
        "generation_s_per_case": drawing,
        "bare_kernel_s_per_case": sum(kernels) / max(len(kernels), 1),
    }


def shared_of(name: str, device: str, processes: int, seconds: float) -> float:
    """Cases per second of so many processes on one device; their start does not count."""
    jobs = [
        Assignment(backend=name, device=device, seed=10 + index, levels=("kernel",), seconds=seconds)
        for index in range(processes)
    ]
    outcome = Pool(jobs, processes, lambda tallies: None, lambda finding: None).run()
    tally = outcome.tallies[name]
    return tally.cases / tally.seconds if tally.seconds else 0.0


def plain_of(name: str, device: str, cases: int) -> dict[str, float] | None:
    """Cases and documents per second of a plain pytest loop; None where it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        told = {"BACKEND": name, "DEVICE": device, "FILE": str(result), "CASES": str(cases + 1)}
        environ = os.environ | {f"ATTN_FUZZ_PLAIN_{key}": value for key, value in told.items()}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(plain_suite.__file__)]
        root = Path(__file__).resolve().parent.parent.parent
        subprocess.run(command, cwd=root, env=environ, capture_output=True, timeout=300, check=False)
        if not result.is_file():
            return None
        measured = json.loads(result.read_text())
    per_second = measured["cases"] / measured["seconds"]
    return {"cases_per_s": per_second, "documents_per_s": per_second * plain_suite.DOCUMENTS}
