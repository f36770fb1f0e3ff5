"""What a process died of, or fell silent for, found out in others, step by step so that a kill costs one step.

A worker that ended or was silent leaves a suspect: the case, or batch of calls, that it had announced. An inquest sees
whether that ends or silences another process, too, which is what makes it the backend's doing, and shrinks it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

from attn_fuzz.campaign.crash_triage import NOT_AGAIN, SHRINK_CRASH_SECONDS
from attn_fuzz.campaign.isolated import Isolated, NoDevice, Report, Subject
from attn_fuzz.campaign.messages import Trying
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.order import simplicity
from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.finding import Finding
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.case import Case

ASK_SECONDS: Final = 45.0
"""For asking again, one call after another, what a worker was at: a batch has hundreds."""

SHRINK_HANG_SECONDS: Final = 120.0
"""For cases that hang: each smaller one that hangs, too, costs ``_BRIEF`` and a new process."""

_BRIEF: Final = 4.0
"""Seconds of silence after which a smaller case of one that hangs is taken to hang as well; the smallest is asked again
with all patience."""

_TIMES: Final = 20.0
"""Silence of so many times what the loop takes for the same case, at the same time on the same machine, is no
slowness."""

_CONTROL: Final = "loop"


@dataclasses.dataclass(frozen=True)
class Suspect:
    """What ran when a worker ended or was silent."""

    finding: Finding
    """Its case is the smallest that is known; what is kept where nothing more can be found out."""
    trying: Trying
    sure: bool
    """Whether it is the backend's doing whatever comes of it: nobody had killed the worker."""
    confirmed: bool = False
    """Whether another process ended so, too: the finding's original case is the call that did it."""
    how: str = ""
    """What is said where it does not happen again, and nobody is accused; empty for nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = {name: getattr(self, name) for name in ("sure", "confirmed", "how")}
        return {"finding": self.finding.to_dict(), "case": self.trying.case, "ends": self.trying.ends, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Suspect:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: for anything else; LookupError and TypeError as well.
        """
        trying = Trying(str(data["case"]), tuple(data["ends"]))
        finding = Finding.from_dict(data["finding"])
        return cls(finding, trying, bool(data["sure"]), bool(data["confirmed"]), str(data["how"]))


def suspect_of(backend: str, device: str, trying: Trying) -> Suspect:
    """What a worker was about to run when everything was killed: most often it has done nothing."""
    case = Case.from_json(trying.case)
    finding = Finding(
        backend=backend,
        device=device,
        symptom="Crashed",
        checks=("runs",),
        messages=("Crashed [runs] process: a campaign ended while it ran this case, which ends another process too",),
        symptoms=({"symptom": "Crashed", "check": "runs", "tensor": "process"},),
        case=case,
        original_case=case,
        cases_to_find=0,
        seconds_to_find=0.0,
        environment=environment("cpu"),
    )
    return Suspect(finding, trying, sure=False)


class Inquest:
    """Looks into one suspect.

    Args:
        suspect: what to look into.
        patience: seconds of silence after which a case counts as hung.
        note: told of the suspect whenever more is known of it.
        known: symptoms of its backend that need no other finding, unless it is sure that this is one.
    """

    def __init__(
        self,
        suspect: Suspect,
        patience: float,
        note: Callable[[Suspect], None],
        known: Collection[str] = (),
    ) -> None:
        self.suspect, self.patience, self._note, self._known = suspect, patience, note, known
        self._open: list[Isolated] = []
        self._judged = False

    def close(self) -> None:
        """Ends its processes."""
        while self._open:
            self._open.pop().close()

    def finding(self) -> Finding | str:
        """The shrunk finding, or why there is none, in a sentence; empty where there is nothing to say.

        Raises:
            NoDevice: when another process cannot use the device at all.
        """
        sure = self.suspect.sure
        try:
            if not self.suspect.confirmed and not self._confirm():
                messages = (*self.suspect.finding.messages, NOT_AGAIN)
                return dataclasses.replace(self.suspect.finding, messages=messages) if sure else self.suspect.how
            return self._shrunk() if sure or self.suspect.finding.symptom not in self._known else ""
        finally:
            self.close()

    # Whether it happens again.

    def _isolated(self, patience: float, backend: str = "") -> Isolated:
        finding = self.suspect.finding
        subject = Subject(backend or finding.backend, finding.device, judged=self._judged)
        self._open.append(Isolated(subject, patience))
        return self._open[-1]

    def _calls(self) -> Iterator[Case]:
        whole = Case.from_json(self.suspect.trying.case)
        if not self.suspect.trying.ends:
            yield whole
            return
        batch = CallBatch(whole, self.suspect.trying.ends)
        for index in range(len(self.suspect.trying.ends)):
            yield batch.call(index)

    def _confirm(self) -> bool:
        """Whether a call ends or silences another process, too: first run alone, then with all that is asked of it."""
        for self._judged in (False, True):
            asked, deadline = self._isolated(self.patience), time.monotonic() + ASK_SECONDS
            for call in self._calls():
                report = _report(asked, call)
                if report.survived or (report.symptom == "Hung" and not self._is_hang(call)):
                    if time.monotonic() > deadline:
                        break
                    continue
                self._learn(call, report)
                return True
        return False

    def _is_hang(self, call: Case) -> bool:
        """Whether the loop comes back from the same case soon: on a machine that is too busy nobody does."""
        seconds = self._seconds_of_loop(call)
        return seconds is not None and _TIMES * seconds < self.patience

    def _seconds_of_loop(self, call: Case) -> float | None:
        """What the loop takes for a case in a new process; None where it does not come back either."""
        control = self._isolated(self.patience, _CONTROL)
        try:
            # Its start is no part of what a case takes.
            control.begin()
            begun = time.monotonic()
            report = _report(control, call)
            return time.monotonic() - begun if report.survived else None
        finally:
            control.close()

    def _learn(self, call: Case, report: Report) -> None:
        """Notes that it has happened again."""
        finding, symptom = self.suspect.finding, str(report.symptom)
        messages = finding.messages
        if not self.suspect.sure or symptom != finding.symptom:
            messages = (f"{symptom} [runs] process: {report.message}", *(messages if self.suspect.sure else ()))
        told = ({"symptom": symptom, "check": "runs", "tensor": "process"},)
        found = dataclasses.replace(
            finding, symptom=symptom, messages=messages, symptoms=told, case=call, original_case=call
        )
        self.suspect = dataclasses.replace(self.suspect, finding=found, sure=True, confirmed=True)
        self._note(self.suspect)

    # How small it can be.

    def _shrunk(self) -> Finding:
        """The finding with the smallest case that still happens with all patience."""
        finding = self.suspect.finding
        original, hangs = finding.original_case, finding.symptom == "Hung"
        seconds = SHRINK_HANG_SECONDS if hangs else SHRINK_CRASH_SECONDS
        small = minimise(finding.case, self._again(self._brief()), seconds, time.monotonic)
        self.close()
        if small == original or _report(self._isolated(self.patience), small).symptom == finding.symptom:
            return dataclasses.replace(finding, case=small)
        # Slow was taken for silent, or what it does depends on what ran before it.
        return dataclasses.replace(finding, case=original)

    def _brief(self) -> float:
        if self.suspect.finding.symptom != "Hung":
            return self.patience
        seconds = self._seconds_of_loop(self.suspect.finding.original_case)
        return self.patience if seconds is None else min(max(_BRIEF, _TIMES * seconds), self.patience)

    def _again(self, patience: float) -> Callable[[Case], bool]:
        asked = self._isolated(patience)

        def again(case: Case) -> bool:
            if _report(asked, case).symptom != self.suspect.finding.symptom:
                return False
            if simplicity(case) < simplicity(self.suspect.finding.case):
                found = dataclasses.replace(self.suspect.finding, case=case)
                self.suspect = dataclasses.replace(self.suspect, finding=found)
                self._note(self.suspect)
            return True

        return again


def _report(asked: Isolated, case: Case) -> Report:
    """What comes of a case; what the harness can say nothing of has come back."""
    try:
        return asked.report(case)
    except ReferencesDisagree:
        return Report()


def look_into(inquest: Inquest) -> Finding | str:
    """The finding of an inquest, or a sentence; what cannot be asked again is kept if it is sure."""
    suspect = inquest.suspect
    try:
        return inquest.finding()
    except NoDevice as trouble:
        return f"the worker for {suspect.finding.backend} ended, but {trouble}: no finding"
    except (LookupError, ValueError):
        return inquest.suspect.finding if inquest.suspect.sure else ""
