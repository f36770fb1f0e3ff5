"""Hunts in this process that end where a test knows enough."""

from __future__ import annotations

from attn_fuzz.backends.faults.fault import PREFIX, RankFault, TensorFault, faults
from attn_fuzz.campaign.messages import Assignment, Candidate, Failed, Found, Message
from attn_fuzz.campaign.serve import WORK
from attn_fuzz.findings.finding import Finding, summarise
from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.reference.case import Case


class _Enough(BaseException):
    """Leaves Hypothesis's engine, as an interruption does."""


def job_of(fault: str, seed: int, cases: int) -> Assignment:
    """The hunt of one planted fault, on as many ranks as it may take."""
    planted = faults()[fault]
    alone = not issubclass(planted, (RankFault, TensorFault))
    return Assignment(
        backend=PREFIX + fault,
        device="cpu",
        seed=seed,
        cases=cases,
        ranks=(1,) if alone else planted.ranks,
        tensor_ranks=(1,) if alone else planted.tensor_ranks,
    )


def first_failure(job: Assignment) -> Finding:
    """What a hunt finds first, as it was drawn: shrinking takes ten times as long."""
    return _first(job, Candidate)


def first_finding(job: Assignment) -> Finding:
    """What a hunt finds first, shrunk."""
    return _first(job, Found)


def _first(job: Assignment, kind: type[Candidate] | type[Found]) -> Finding:
    found: list[Finding] = []

    def take(message: Message) -> None:
        assert not isinstance(message, Failed), message
        if isinstance(message, kind):
            found.append(message.finding)
            raise _Enough

    try:
        WORK[job.mode](job, take)
    except _Enough:
        return found[0]
    raise AssertionError(f"nothing was found in {job.cases} cases of {job.backend}")


def finding_of(backend: str, case: Case, verdict: Verdict) -> Finding:
    """The finding of a case that fails, had it been drawn."""
    return Finding(
        backend=backend,
        device="cpu",
        symptom=type(verdict.first).__name__,
        **summarise(verdict),
        case=case,
        original_case=case,
        cases_to_find=1,
        seconds_to_find=0.0,
    )
