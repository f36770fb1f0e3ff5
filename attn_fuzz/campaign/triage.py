"""What modes that judge many documents at a time do with one that fails: hand it to the case mode."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.campaign.messages import Found
from attn_fuzz.campaign.worker import Worker
from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.finding import Finding
from attn_fuzz.oracle.checks import PROBES, Check
from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.oracle.second_opinion import confirm_call
from attn_fuzz.oracle.symptoms import Crashed, Symptom
from attn_fuzz.reference.case import Case


class Triage(Worker):
    """A worker whose candidates are some of many documents that were judged together."""

    def note_candidate(self, case: Case) -> None:
        """Notes the case that a finding will have been drawn as."""
        self.original, self.failed_at = case, time.monotonic()

    def narrow(self, case: Case, probes: Sequence[Check] = PROBES) -> Verdict | None:
        """All checks of the case mode, or those, on a cut-out; None where the backend does not take it."""
        try:
            return self.examine(case, probes=probes)
        except UnsupportedCase:
            return None

    def hand_over(self, case: Case, verdict: Verdict) -> None:
        """Lets the case mode shrink and report what it fails too."""
        if type(verdict.first).__name__ in self.found:
            self.tally.repeated += 1
            return
        self.report(case, verdict)

    def count_known(self, known: dict[str, None]) -> None:
        """Adds known issues that explain what was seen."""
        for issue in known:
            self.tally.known[issue] = self.tally.known.get(issue, 0) + 1

    def report_as_seen(
        self,
        symptom: type[Symptom],
        check: str,
        message: str,
        case: Case,
        *,
        tensor: str = "",
        sequence: Mapping[str, Any] | None = None,
    ) -> None:
        """A finding that the case mode does not show, once per symptom.

        Args:
            symptom: of what.
            check: which mode saw it.
            message: a sentence.
            case: which it saw it in.
            tensor: the result that is wrong, where it is one.
            sequence: the calls that it takes.
        """
        name = symptom.__name__
        if name in self.found:
            self.tally.repeated += 1
            return
        if symptom is Crashed and self.doubts(message):
            self.end(message)
        confirm_call(case, symptom, self.backend.kernel.profile_on(self.device.type), self.device)
        self.found.add(name)
        assert self.original is not None
        finding = Finding(
            backend=self.backend.name,
            device=str(self.device),
            symptom=name,
            checks=(check,),
            messages=(f"{name} [{check}] {message}",),
            symptoms=({"symptom": name, "check": check, "tensor": tensor},),
            case=case,
            original_case=self.original,
            cases_to_find=self.tally.cases,
            seconds_to_find=round(self.failed_at - self.started, 3),
            environment=environment(str(self.device)),
            sequence=sequence,
        )
        self.send(Found(finding))
