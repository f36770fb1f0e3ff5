"""Hunts that end where a test knows enough."""

from __future__ import annotations

from attn_fuzz.backends.faults.fault import PREFIX, RankFault, TensorFault, faults
from attn_fuzz.reference.case import Case

from attn_fuzz.campaign.messages import Assignment, Candidate, Message
from attn_fuzz.campaign.worker import hunt
from attn_fuzz.findings.finding import Finding, summarise
from attn_fuzz.oracle.examine import Verdict


class _Enough(BaseException):
    """Leaves Hypothesis's engine, as an interruption does."""


def first_failure(fault: str, seed: int, cases: int) -> Finding:
    """What a hunt finds, as it was drawn: shrinking it takes ten times as long."""
    planted = faults()[fault]
    spread = issubclass(planted, (RankFault, TensorFault))
    job = Assignment(
        backend=PREFIX + fault,
        device="cpu",
        seed=seed,
        cases=cases,
        ranks=planted.ranks if spread else (1,),
        tensor_ranks=planted.tensor_ranks if spread else (1,),
    )
    found: list[Finding] = []

    def take(message: Message) -> None:
        if isinstance(message, Candidate):
            found.append(message.finding)
            raise _Enough

    try:
        hunt(job, take)
    except _Enough:
        return found[0]
    raise AssertionError(f"{fault} was not found in {cases} cases")


def finding_of(backend: str, case: Case, verdict: Verdict) -> Finding:
    """The finding of a case that fails, had it been drawn."""
    checks, messages = summarise(verdict)
    return Finding(
        backend=backend,
        device="cpu",
        symptom=type(verdict.first).__name__,
        checks=checks,
        messages=messages,
        case=case,
        original_case=case,
        cases_to_find=1,
        seconds_to_find=0.0,
    )
