"""Mutation testing of the harness: every seeded fault is hunted without hints, from several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.faults.fault import PREFIX, RankFault, TensorFault, faults
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.campaign.messages import Assignment, Failed, Found, Message
from attn_fuzz.campaign.serve import WORK
from attn_fuzz.cases.order import tokens
from attn_fuzz.cases.smaller import fewer_documents, one_shorter
from attn_fuzz.evaluation.published_tolerances import failing
from attn_fuzz.execution.process import set_up_process
from attn_fuzz.findings.finding import Finding
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.drawing import FEW, few_cases
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

MAX_CASES: Final = 2000
RULE_CASES: Final = 60
"""Cases per level on which the published rules are tried."""


@dataclasses.dataclass(frozen=True)
class MutantResult:
    """How one fault fared from one seed."""

    fault: str
    seed: int
    finding: Finding | None
    cases: int
    seconds: float
    minimal: bool | None
    """No document can be removed, and none shortened by one token: the case would pass."""


Spread = tuple[Sequence[int], Sequence[int]]
"""Ranks and tensor ranks to draw from."""

ALONE: Final = ((1,), (1,))


def _spread(fault: str) -> Spread:
    """On how many ranks a fault is hunted."""
    planted = faults()[fault]
    if not issubclass(planted, (RankFault, TensorFault)):
        return ALONE
    return planted.ranks, planted.tensor_ranks


def find_fault(fault: str, seed: int, max_cases: int = MAX_CASES, mode: str = "case") -> MutantResult:
    """Hunts one fault on the CPU until it is found, by the case mode or by batches."""
    messages: list[Message] = []
    ranks, tensor_ranks = _spread(fault)
    WORK[mode](
        Assignment(
            backend=PREFIX + fault,
            device="cpu",
            seed=seed,
            cases=max_cases,
            stop_at_first=True,
            mode=mode,
            ranks=tuple(ranks),
            tensor_ranks=tuple(tensor_ranks),
        ),
        messages.append,
    )
    for message in messages:
        if isinstance(message, Failed):
            raise RuntimeError(message.reason)
    found = [message.finding for message in messages if isinstance(message, Found)]
    if not found:
        return MutantResult(fault, seed, None, max_cases, 0.0, None)
    finding = found[0]
    return MutantResult(fault, seed, finding, finding.cases_to_find, finding.seconds_to_find, is_minimal(finding))


_MOST_SMALLER: Final = 500
"""Smaller cases that are asked of each kind: of thousands of documents there would be as many, of minutes each."""


def is_minimal(finding: Finding) -> bool:
    """Whether every case with a document less, or one token less in a document, no longer shows the symptom."""
    backend = registry.load(finding.backend)

    def fails(case: Case) -> bool:
        try:
            first = examine(case, backend, finding.device).first
        except UnsupportedCase:
            return False
        return first is not None and type(first).__name__ == finding.symptom

    smaller = dict.fromkeys(
        case
        for step in (fewer_documents, one_shorter)
        for case in itertools.islice(step(finding.case), _MOST_SMALLER)
        if case is not None
    )
    return not any(fails(case) for case in smaller)


def drawn(backend: registry.Backend, seed: int, count: int, spread: Spread = ALONE, device: str = "cpu") -> list[Case]:
    """So many cases of every level of a backend, as a campaign draws them, on so many ranks."""
    found: list[Case] = []
    for level in backend.levels:
        domain = Domain.of(backend.kernel.capabilities_on(device), device, (), *spread)

        def keep(case: Case) -> None:
            if backend.refusal(case, device) is None:
                found.append(case)

        for number in range(0, count, FEW):
            few_cases(level, domain, seed * 1_000_003 + number, keep, min(FEW, count - number))
    return found


def rules_on(fault: str, count: int = RULE_CASES) -> set[str]:
    """Published rules that fail the fault on some drawn case on which they pass the correct implementation."""
    set_up_process("cpu")
    faulty, correct, pytorch = (registry.load(name) for name in (PREFIX + fault, "loop", "backup"))
    device = torch.device("cpu")
    caught: set[str] = set()
    for case in drawn(faulty, 0, count, _spread(fault)):
        # As such suites have it: K/V as they come, no rows behind the last document, no gradient but the output's.
        plain = case.replace(memory="contiguous", capacity=0, lse_gradient=False, loose_max_seqlen=(0, 0), gaps=(0, 0))
        try:
            trials = [Trial(plain, backend, device, ("none",)) for backend in (faulty, correct, pytorch)]
            wrong, right, own = (trial.observe("none").results for trial in trials)
        except Exception:
            # A fault may crash or refuse; the rules have nothing to say about that.
            continue
        references = {name: expected.value for name, expected in trials[1].answer.items()}
        caught |= failing(wrong, references, own) - failing(right, references, own)
    return caught


def take(fault: str, seed: int | None, max_cases: int, mode: str = "case") -> MutantResult | tuple[str, set[str]]:
    """One unit of work: a hunt, or (seed None) the published rules."""
    return (fault, rules_on(fault)) if seed is None else find_fault(fault, seed, max_cases, mode)


def row(fault: str, marks: Sequence[MutantResult], rules: set[str] | None) -> dict[str, Any]:
    """The JSON object of a fault from its marks."""
    planted = faults()[fault]
    found = [mark.finding for mark in marks if mark.finding is not None]
    case = found[0].case if found else None
    return {
        "id": fault,
        "about": planted.about(),
        "reports": list(planted.reports),
        "caught": len(found) == len(marks),
        "symptoms": sorted({finding.symptom for finding in found}),
        "checks": sorted({check for finding in found for check in finding.checks}),
        "cases": int(statistics.median(mark.cases for mark in marks)),
        "cases_by_seed": [mark.cases for mark in marks],
        "seconds": round(statistics.median(mark.seconds for mark in marks), 2),
        "documents": max((len(finding.case.packed_lengths) for finding in found), default=None),
        "tokens": max((tokens(finding.case) for finding in found), default=None),
        "minimal": all(mark.minimal for mark in marks) if found else None,
        "case": None if case is None else case.to_dict(),
        "rules": None if rules is None else sorted(rules),
    }
