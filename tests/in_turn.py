"""Campaigns without processes of their own, for tests of anything else about them: starting one takes four seconds."""

from __future__ import annotations

import dataclasses

from attn_fuzz.backends import registry
from attn_fuzz.campaign.isolated import Report, Subject, report_of
from attn_fuzz.campaign.messages import Message
from attn_fuzz.campaign.pool import Pool, Worker
from attn_fuzz.campaign.serve import WORK
from attn_fuzz.reference.case import Case


class InTurn(Pool):
    """Does assignments in this process, one after another."""

    def _step(self) -> None:
        assignment, restarts = self._waiting.popleft()
        worker = Worker(assignment, None, None, None, restarts, 0)  # type: ignore[arg-type]

        def take(message: Message) -> None:
            self._take(worker, message)

        WORK[assignment.mode](self._in_time(assignment), take)
        self._done.append(worker)


class InThisProcess:
    """Stands for ``Isolated`` where nothing dies."""

    def __init__(self, subject: Subject, timeout: float, soon: float | None = None) -> None:
        self.subject, self.backend = subject, registry.load(subject.backend)

    def report(self, case: Case, *, operators: bool = False, judged: bool | None = None) -> Report:
        subject = self.subject if judged is None else dataclasses.replace(self.subject, judged=judged)
        return report_of(case, subject, self.backend, operators=operators)

    def close(self) -> None:
        pass

    def end(self) -> None:
        pass
