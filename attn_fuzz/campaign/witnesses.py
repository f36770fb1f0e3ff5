"""The processes of an inquest: those that are asked for a case, and one that says how slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from attn_fuzz.campaign.isolated import NO_MEMORY, Isolated, Report, Subject
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.reference.case import Case

BRIEF: Final = 8.0
"""Seconds of silence after which a case is taken to hang, until the smallest is asked with all patience."""

_TIMES: Final = 20.0
"""Silence of so many times what the loop takes for the same case, at the same time on the same machine, is no
slowness."""

_TIMES_AT_FIRST: Final = 4.0
"""The same of the first case of a process, which loads libraries."""

SOON_SECONDS: Final = 40.0
"""The patience with a process in which nothing is compiled or imported (watch.py)."""

_MOST_SECONDS: Final = 180.0
"""Of silence, after which a machine is too busy for anybody to say who hangs."""

_MEMORY: Final = 4 << 30
"""Bytes that a process may have on a CPU, as a worker may in any case: a kernel that allocates without end is refused
more, as it is in a worker, before it has been silent for long enough to be taken for one that hangs."""

_PAUSES: Final = 3
_PAUSE_SECONDS: Final = 3.0
"""Of waiting for memory that others have taken."""

_CONTROL: Final = "loop"


class Witnesses:
    """Processes of one backend.

    Args:
        backend: that is asked.
        device: where.
        without: capabilities of a user's backend as they were found out.
    """

    def __init__(self, backend: str, device: str, without: Mapping[str, Any]) -> None:
        # A plain dictionary: it is handed to new processes.
        self._backend, self._device, self._without = backend, device, dict(without)
        self.judged = False
        """Whether results are judged, or only looked at for whether there are any."""
        self._open: list[Isolated] = []
        self._control: Isolated | None = None
        self._spare: Isolated | None = None
        self._slowest = 0.0
        """Seconds of the loop's slowest case, the first time that it was asked."""

    def close(self) -> None:
        """Ends all of them."""
        self._control = self._spare = None
        while self._open:
            self._open.pop().close()

    def _started(self, backend: str, without: Mapping[str, Any], patience: float) -> Isolated:
        memory = _MEMORY if self._device == "cpu" else 0
        subject = Subject(backend, self._device, without, memory=memory)
        self._open.append(Isolated(subject, patience, min(patience, SOON_SECONDS)))
        self._open[-1].prepare()
        return self._open[-1]

    def another(self, patience: float) -> Isolated:
        """A process that has run nothing; the next one starts while this is asked.

        Args:
            patience: seconds of silence after which a case counts as hung.
        """
        found = self._spare or self._started(self._backend, self._without, patience)
        found.be_patient(patience, min(patience, SOON_SECONDS))
        self._spare = self._started(self._backend, self._without, patience)
        return found

    def loop(self) -> Isolated:
        """The process that says what slowness is."""
        if self._control is None:
            self._control = self._started(_CONTROL, {}, _MOST_SECONDS)
        return self._control

    def patience_for(self, call: Case) -> float | None:
        """Seconds of silence that are no slowness: many times what the loop takes; None where that is too long."""
        control = self.loop()
        # Its start is no part of what a case takes.
        control.begin()
        took = [seconds for seconds in (self._seconds_of(control, call), self._seconds_of(control, call)) if seconds]
        if len(took) < 2:
            return None
        # The first of all has loaded libraries, as every new process has to that is asked.
        self._slowest = max(self._slowest, took[0])
        patience = max(BRIEF, _TIMES_AT_FIRST * self._slowest, _TIMES * took[1])
        return patience if patience <= _MOST_SECONDS else None

    def report(self, asked: Isolated, case: Case, pause: Callable[[float], object] = time.sleep) -> Report:
        """What comes of a case in one of them; what the harness can say nothing of has come back.

        Where others have filled a GPU it is asked again a little later, a few times; on a CPU each has its own share.
        """
        try:
            for _ in range(_PAUSES if self._device != "cpu" else 0):
                report = asked.report(case, judged=self.judged)
                if report.refusal != NO_MEMORY:
                    return report
                pause(_PAUSE_SECONDS)
            return asked.report(case, judged=self.judged)
        except ReferencesDisagree:
            return Report()

    def _seconds_of(self, asked: Isolated, case: Case) -> float | None:
        """What a case takes; None where it does not come back."""
        begun = time.monotonic()
        return time.monotonic() - begun if self.report(asked, case).survived else None
