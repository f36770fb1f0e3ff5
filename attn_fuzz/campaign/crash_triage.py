"""What a worker died of, found out in other processes."""

from __future__ import annotations

import dataclasses
import time
from typing import Final

from attn_fuzz.campaign.isolated import Isolated, Subject
from attn_fuzz.campaign.messages import Assignment, Trying
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.finding import Finding
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.case import Case

SHRINK_CRASH_SECONDS: Final = 45.0
"""For cases that kill their process: each failing candidate costs a new one, several seconds on a GPU."""

NOT_AGAIN: Final = "It did not happen again in a process of its own."


@dataclasses.dataclass(frozen=True)
class Death:
    """What is known of it."""

    original: Case
    """What the worker was trying; of a batch, the first call that ends another process too, if one does."""
    case: Case
    """A smaller one that ends a process as well."""
    again: bool
    """Whether it happened again."""


def finding_of_death(backend: str, device: str, trying: Trying, symptom: str, message: str) -> Finding:
    """The finding that a worker's last case is, where the worker ended or went silent.

    Args:
        backend: of the worker.
        device: of the worker.
        trying: what it had announced last.
        symptom: ``Crashed`` or ``Hung``.
        message: of the finding.

    Raises:
        CaseError: when what it had announced is no case.
    """
    case = Case.from_json(trying.case)
    return Finding(
        backend=backend,
        device=device,
        symptom=symptom,
        checks=("runs",),
        messages=(message,),
        symptoms=({"symptom": symptom, "check": "runs", "tensor": "process"},),
        case=case,
        original_case=case,
        cases_to_find=0,
        seconds_to_find=0.0,
        environment=environment("cpu"),
    )


def crash_triage_of(job: Assignment, trying: Trying, patience: float) -> Death:
    """Runs what a worker was trying when it died in other processes, and shrinks what kills those.

    Args:
        job: the worker's.
        trying: what it announced last.
        patience: seconds after which such a process counts as hung.

    Raises:
        NoDevice: when another process cannot use the device at all.
    """
    whole = Case.from_json(trying.case)
    isolated = Isolated(Subject(job.backend, job.device, job.without), patience)

    def dies(case: Case) -> bool:
        return isolated.symptom(case) == "Crashed"

    deadline = time.monotonic() + SHRINK_CRASH_SECONDS
    batch = CallBatch(whole, trying.ends) if trying.ends else None
    try:
        for index in range(len(trying.ends) or 1):
            if time.monotonic() > deadline:
                break
            call = whole if batch is None else batch.call(index)
            if dies(call):
                return Death(call, minimise(call, dies, SHRINK_CRASH_SECONDS, time.monotonic), again=True)
    finally:
        isolated.close()
    return Death(whole, whole, again=False)
