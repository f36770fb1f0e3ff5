"""What a process died of, or fell silent for, found out in others, step by step so that a kill costs one step.

A worker that ended or was silent leaves a suspect: the case, or batch of calls, that it had announced. An inquest sees
whether that ends or silences another process, too, which is what makes it the backend's doing, and shrinks it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from attn_fuzz.campaign.isolated import NoDevice, Report
from attn_fuzz.campaign.messages import Trying
from attn_fuzz.campaign.witnesses import BRIEF, Witnesses
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.order import simplicity
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.process import states_no_cause
from attn_fuzz.findings.finding import Finding
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.case import Case

ASK_SECONDS: Final = 45.0
"""For asking again, one call after another, what a worker was at: a batch has hundreds."""

SHRINK_CRASH_SECONDS: Final = 45.0
"""For cases that kill their process: each failing candidate costs a new one, several seconds on a GPU."""

SHRINK_HANG_SECONDS: Final = 120.0
"""For cases that hang: each smaller one that hangs, too, costs ``BRIEF`` and a new process."""

NOT_AGAIN: Final = "It did not happen again in a process of its own."


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


@dataclasses.dataclass(frozen=True)
class Suspect:
    """What ran when a worker ended or was silent."""

    finding: Finding
    """Its case is the smallest that is known; what is kept where nothing more can be found out."""
    trying: Trying
    sure: bool
    """Whether it is the backend's doing whatever comes of it: nobody had killed the worker."""
    confirmed: bool = False
    """Whether another process ended so, too, or was silent for a while: the finding's original case is the call that
    did it."""
    silence: float = 0.0
    """Seconds in which the worker had said nothing, as far as that is known."""
    how: str = ""
    """What is said where it does not happen again, and nobody is accused; empty for nothing."""
    spent: float = 0.0
    """Seconds in which its case has been made smaller, by this process and those that were killed over it."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = {name: getattr(self, name) for name in ("sure", "confirmed", "silence", "how", "spent")}
        return {"finding": self.finding.to_dict(), "case": self.trying.case, "ends": self.trying.ends, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Suspect:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: for anything else; LookupError and TypeError as well.
        """
        trying = Trying(str(data["case"]), tuple(data["ends"]))
        finding = Finding.from_dict(data["finding"])
        sure, confirmed = bool(data["sure"]), bool(data["confirmed"])
        silence, spent = float(data["silence"]), float(data.get("spent", 0.0))
        return cls(finding, trying, sure, confirmed, silence, str(data["how"]), spent)


def suspect_of(backend: str, device: str, trying: Trying, silence: float) -> Suspect:
    """What a worker was about to run when everything was killed: most often it has done nothing.

    Args:
        backend: of the worker.
        device: of the worker.
        trying: what it had announced.
        silence: seconds since then.

    Raises:
        CaseError: when it is no case.
    """
    message = "Crashed [runs] process: a campaign ended while it ran this case, which ends another process too"
    finding = finding_of_death(backend, device, trying, "Crashed", message)
    return Suspect(finding, trying, sure=False, silence=silence)


class Inquest:
    """Looks into one suspect.

    Args:
        suspect: what to look into.
        patience: seconds of silence after which a case counts as hung.
        note: told of the suspect whenever more is known of it.
        known: symptoms of its backend that need no other finding.
        without: capabilities of a user's backend as they were found out.
    """

    def __init__(
        self,
        suspect: Suspect,
        patience: float,
        note: Callable[[Suspect], None] = lambda suspect: None,
        known: Collection[str] = (),
        without: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.suspect, self.patience, self._note, self._known = suspect, patience, note, known
        self._witnesses = Witnesses(suspect.finding.backend, suspect.finding.device, without)

    def close(self) -> None:
        """Ends its processes."""
        self._witnesses.close()

    def finding(self) -> Finding | str:
        """The shrunk finding, or why there is none, in a sentence; empty where there is nothing to say.

        Raises:
            NoDevice: when another process cannot use the device at all.
        """
        try:
            if self.suspect.confirmed or self._confirm():
                if self.suspect.finding.symptom in self._known:
                    return ""
                self._shrink()
                if (last := self._with_all_patience()) is not None:
                    return last
            if not self.suspect.sure:
                return self.suspect.how
            original = self.suspect.finding.original_case
            messages = (*self.suspect.finding.messages, NOT_AGAIN)
            return dataclasses.replace(self.suspect.finding, case=original, messages=messages)
        finally:
            self.close()

    # Whether it happens again.

    def _calls(self) -> Iterator[Case]:
        whole = Case.from_json(self.suspect.trying.case)
        if not self.suspect.trying.ends:
            yield whole
            return
        batch = CallBatch(whole, self.suspect.trying.ends)
        for index in range(len(self.suspect.trying.ends)):
            yield batch.call(index)

    def _confirm(self) -> bool:
        """Whether a call ends or silences another process, too: first run alone, then with all that is asked of it.

        Of calls of a batch nothing else was asked; so many are asked it only where it is sure that one of them did it.
        """
        both = self.suspect.sure or not self.suspect.trying.ends
        if not self.suspect.sure or self.suspect.finding.symptom == "Hung":
            # It starts meanwhile.
            self._witnesses.loop()
        for judged in (False, True) if both else (False,):
            self._witnesses.judged = judged
            asked, deadline = self._witnesses.another(min(BRIEF, self.patience)), time.monotonic() + ASK_SECONDS
            for call in self._calls():
                report = self._witnesses.report(asked, call)
                if self._accuses(report, call):
                    self._learn(call, report)
                    return True
                if time.monotonic() > deadline:
                    break
            asked.close()
        return False

    def _accuses(self, report: Report, call: Case) -> bool:
        """Whether what came of a call in one other process is the backend's doing."""
        if report.symptom == "Hung":
            return self._is_hang(call)
        return not report.survived or (_states_no_cause(report) and self._fails_alike(call))

    def _fails_alike(self, call: Case) -> bool:
        """Whether a call for whose failure no cause is stated fails so in one more process: others may fill a GPU
        twice, but not whenever it is asked."""
        asked = self._witnesses.another(self.patience)
        try:
            report = self._witnesses.report(asked, call)
            return not report.survived or _states_no_cause(report)
        finally:
            asked.close()

    def _is_hang(self, call: Case) -> bool:
        """Whether a case that was silent for a while is so for longer than any slowness: on a busy machine, and of a
        large case, the loop says how long that is."""
        patience = self._witnesses.patience_for(call)
        if patience is None or patience <= BRIEF:
            return patience is not None
        asked = self._witnesses.another(patience)
        try:
            return self._witnesses.report(asked, call).symptom == "Hung"
        finally:
            asked.close()

    def _learn(self, call: Case, report: Report) -> None:
        """Notes that it has happened again."""
        finding, symptom = self.suspect.finding, str(report.symptom)
        where, said = ("call", report.said) if report.survived else ("process", report.message)
        messages = finding.messages
        if not self.suspect.sure or symptom != finding.symptom:
            messages = (f"{symptom} [runs] {where}: {said}", *(messages if self.suspect.sure else ()))
        told = ({"symptom": symptom, "check": "runs", "tensor": where},)
        found = dataclasses.replace(
            finding, symptom=symptom, messages=messages, symptoms=told, case=call, original_case=call
        )
        self._note_more(confirmed=True, finding=found)

    def _note_more(self, **changes: Any) -> None:
        self.suspect = dataclasses.replace(self.suspect, **changes)
        self._note(self.suspect)

    # How small it can be.

    def _shrink(self) -> None:
        """Makes the case smaller, as long as it ends another process, or is silent for a while."""
        finding = self.suspect.finding
        hangs = finding.symptom == "Hung"
        # A campaign that is killed again and again would never come to an end of it otherwise.
        before = self.suspect.spent
        seconds = (SHRINK_HANG_SECONDS if hangs else SHRINK_CRASH_SECONDS) - before
        if seconds <= 0:
            return
        patience = (hangs and self._witnesses.patience_for(finding.original_case)) or self.patience
        asked, begun = self._witnesses.another(patience), time.monotonic()

        def again(case: Case) -> bool:
            nonlocal asked
            report = self._witnesses.report(asked, case)
            if not report.survived:
                asked.close()
                asked = self._witnesses.another(patience)
            symptom = report.symptom
            self._note_more(spent=before + time.monotonic() - begun)
            if symptom != finding.symptom:
                return False
            if simplicity(case) < simplicity(self.suspect.finding.case):
                self._note_more(finding=dataclasses.replace(self.suspect.finding, case=case))
            return True

        minimise(finding.case, again, seconds, time.monotonic)
        asked.close()

    def _with_all_patience(self) -> Finding | None:
        """The finding with the smallest case, asked again in a new process; with the call that was drawn where that
        comes back."""
        finding = self.suspect.finding
        hangs = finding.symptom == "Hung"
        for case in dict.fromkeys((finding.case, finding.original_case)):
            patience = self._witnesses.patience_for(case) if hangs else self.patience
            if patience is None:
                continue
            asked = self._witnesses.another(max(patience, self.patience))
            report = self._witnesses.report(asked, case)
            asked.close()
            if report.symptom == finding.symptom:
                said = f"Hung [runs] process: {report.message}" if hangs else finding.messages[0]
                return dataclasses.replace(finding, case=case, messages=(said, *finding.messages[1:]))
        return None


def _states_no_cause(report: Report) -> bool:
    """Whether a call failed in a process that is still there, and what it said of that names no cause."""
    return report.symptom == "Crashed" and report.survived and states_no_cause(report.message)


def look_into(inquest: Inquest) -> Finding | str:
    """The finding of an inquest, or a sentence; what cannot be asked again is kept if it is sure."""
    suspect = inquest.suspect
    try:
        return inquest.finding()
    except NoDevice as trouble:
        return f"the worker for {suspect.finding.backend} ended, but {trouble}: no finding"
    except (LookupError, ValueError):
        return inquest.suspect.finding if inquest.suspect.sure else ""
