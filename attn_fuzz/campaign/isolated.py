"""Cases that may take their process with them: each runs in a child that is replaced when it dies."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable, UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign import new_process
from attn_fuzz.campaign.endings import INTERRUPTED, cause_of_death, excuse
from attn_fuzz.campaign.watch import Watch
from attn_fuzz.execution.compilers import triton_variants
from attn_fuzz.execution.operators import operators_of
from attn_fuzz.execution.process import (
    DEAD_CONTEXT,
    NO_DEVICE,
    NOT_OURS,
    context_alive,
    is_fault,
    leave_all_memory,
    limit_memory,
    not_its_doing,
    set_apart,
    set_up_process,
)
from attn_fuzz.execution.timing import processor_seconds
from attn_fuzz.oracle.examine import examine, tried
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.oracle.symptoms import Crashed, Hung, Symptom
from attn_fuzz.reference.case import Case

KNOWN_ISSUE: Final = "KnownIssue"
"""Stands for a symptom that a known issue explains."""


NO_MEMORY: Final = "memory ran out"
"""Why a case is refused that there was too little memory for."""


class NoDevice(BackendUnavailable):
    """A new process cannot use the device either: what another died of is no kernel's doing."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What runs in such a process, and what is asked of it."""

    backend: str
    device: str
    without: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of a user's backend: capabilities as they were found out (``campaign.limits``)."""
    judged: bool = True
    """Whether results are judged, or only looked at for whether there are any (``examine.tried``)."""
    memory: int = 0
    """Bytes that the process may have: more is refused, instead of filling the machine; 0 for any."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of a case."""

    symptom: str | None = None
    """Name of the first symptom: ``Crashed`` when the process died, ``Hung`` when it went silent; None for none."""
    message: str = ""
    said: str = ""
    """The same without the symptom's name, its check and what is wrong; empty where the case did not come back."""
    error: str = ""
    """What kind of exception the symptom is, where it is one (``execution.process.kind_of``)."""
    refusal: str | None = None
    """Why the case was refused, if it was."""
    survived: bool = True
    """Whether the process did."""
    operators: tuple[str, ...] = ()
    """Names of torch's operators that ran, where that was asked."""
    seconds: float = 0.0
    """What it took of processors' time, where it came back, no operators were asked for, and its process had run
    another one: the first loads libraries."""
    variants: int = 0
    """Kernels that Triton compiled for it, or found compiled on disk."""
    disagreement: str | None = None
    """Why the harness can say nothing of it (oracle/second_opinion.py), if that is so."""


def report_of(
    case: Case,
    subject: Subject,
    backend: Backend,
    *,
    operators: bool = False,
    clock: Callable[[], float] = processor_seconds,
) -> Report:
    """What comes of a case in this process, which ends where its CUDA context does."""
    place, variants, began = torch.device(subject.device), triton_variants(), clock()
    try:
        judge = functools.partial(examine if subject.judged else tried, case, backend, place)
        verdict, ran = operators_of(judge) if operators else (judge(), ())
    except UnsupportedCase as error:
        return Report(refusal=str(error))
    except ReferencesDisagree as error:
        return Report(disagreement=str(error))
    except (torch.OutOfMemoryError, MemoryError):
        # Of memory that there is not a kernel is not accused, nor is its process ended.
        leave_all_memory(place)
        return Report(refusal=NO_MEMORY)
    first = verdict.first
    if isinstance(first, Crashed) and not context_alive(place):
        raise SystemExit(DEAD_CONTEXT if is_fault(str(first)) else NOT_OURS)
    seconds = 0.0 if operators or isinstance(first, Crashed) else clock() - began
    report = Report(operators=ran, seconds=seconds, variants=triton_variants() - variants)
    if first is not None:
        error_type = first.error if isinstance(first, Crashed) else ""
        return dataclasses.replace(
            report, symptom=type(first).__name__, message=str(first), said=first.message, error=error_type
        )
    if verdict.known:
        return dataclasses.replace(report, symptom=KNOWN_ISSUE, message=f"known issue: {', '.join(verdict.known)}")
    return report


def _serve(subject: Subject, connection: Connection) -> None:
    set_apart()
    if subject.memory:
        limit_memory(subject.memory)
    try:
        set_up_process(subject.device)
        usable = context_alive(torch.device(subject.device))
    except Exception:
        # A torch built without CUDA lacks even the function.
        usable = False
    if not usable:
        raise SystemExit(NO_DEVICE)
    loaded = registry.narrowed(registry.load(subject.backend), subject.without)
    loaded = dataclasses.replace(loaded, isolated=True)
    # What a case takes begins here: on a busy machine torch is half a minute in coming.
    connection.send(None)
    try:
        for number in itertools.count():
            text, operators, judged = connection.recv()
            about = subject if judged is None else dataclasses.replace(subject, judged=judged)
            with not_its_doing():
                report = report_of(Case.from_json(text), about, loaded, operators=operators)
            connection.send(report if number else dataclasses.replace(report, seconds=0.0))
    except EOFError:
        return
    except KeyboardInterrupt:
        # The parent says it in a sentence, or has been interrupted itself: a traceback says nothing more.
        raise SystemExit(INTERRUPTED) from None


AWAY_FROM_OTHERS: Final = {"CUDA_MPS_PIPE_DIRECTORY": os.devnull}
"""Where processes share a GPU through a server (CUDA MPS), a fault in one ends all; not so for a child without it."""


_START_SECONDS: Final = 120.0
"""For a process to begin, beside the time of its first case."""

_LOOK_SECONDS: Final = 1.0
"""Between looks at a process that is silent."""

FATAL: Final = ("Crashed", "Hung")
"""Symptoms of cases that are not safe to run in a process with anything else to do."""


class Ended(Exception):
    """There are to be no more answers."""


class Isolated:
    """Runs cases of one backend in a child process.

    Args:
        subject: the backend, where, and what is asked.
        timeout: seconds after which a case counts as hung.
        soon: the same where the process neither compiles nor imports; None for no other.
    """

    def __init__(self, subject: Subject, timeout: float, soon: float | None = None) -> None:
        self._subject = subject
        self.be_patient(timeout, soon)
        self._watch: Watch | None = None
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._ready = False
        self._ended = False

    def symptom(self, case: Case) -> str | None:
        """Name of the case's first symptom, if any.

        Raises:
            NoDevice: when the process could not use its device before there was any case.
        """
        return self.report(case).symptom

    def fatal(self, case: Case) -> Symptom | None:
        """The symptom of a case that ended its process or hung; None for one that came back, right or wrong."""
        report = self.report(case)
        if report.survived:
            return None
        return (Hung if report.symptom == "Hung" else Crashed)("runs", "process", report.message)

    def answer(self, case: Case) -> str:
        """In words: ``right``, ``refused: ...``, ``crashed: ...``, ``hung``, ``known issue: ...`` or ``wrong: ...``."""
        report = self.report(case)
        if report.refusal is not None:
            return f"refused: {report.refusal}"
        match report.symptom:
            case None:
                return "right"
            case "Hung":
                return "hung"
            case "Crashed":
                return f"crashed: {report.message}"
            case _:
                return report.message if report.symptom == KNOWN_ISSUE else f"wrong: {report.message}"

    def report(self, case: Case, *, operators: bool = False, again: bool = False, judged: bool | None = None) -> Report:
        """What came of a case.

        Args:
            case: what to run.
            operators: tell the names of torch's operators that ran, which takes longer.
            again: a process ended before while it ran this case, and that was excused.
            judged: whether results are judged, where that is not as the subject says.

        Raises:
            NoDevice: as ``symptom`` does.
            ReferencesDisagree: as ``examine`` does.
            Ended: where another thread has called ``end``.
        """
        if self._ended:
            raise Ended
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._connection is not None
        try:
            if not self._is_ready():
                return self._hung(_START_SECONDS)
            self._connection.send((case.to_json(), operators, judged))
            if (silent := self._silent()) is not None:
                return self._hung(silent)
            found: Report = self._connection.recv()
        except (EOFError, OSError):
            # OSError: it died before it had read the case, or in the middle of its answer.
            if self._ended:
                raise Ended from None
            self._process.join()
            exit_code = self._process.exitcode
            self.close()
            if exit_code == NO_DEVICE:
                raise NoDevice(f"a new process cannot use {self._subject.device}, whatever it runs there") from None
            if excuse(exit_code) and not again:
                return self.report(case, operators=operators, again=True, judged=judged)
            how = cause_of_death(exit_code)
            return Report("Crashed", f"the process {how} while it ran this case", survived=False)
        if found.disagreement is not None:
            raise ReferencesDisagree(found.disagreement)
        return found

    def prepare(self) -> None:
        """Starts the child, and waits for nothing."""
        if self._process is None:
            self._start()

    def be_patient(self, timeout: float, soon: float | None = None) -> None:
        """Has a case count as hung after so many seconds from now on, as it was made for."""
        self._timeout, self._soon = timeout, timeout if soon is None else soon

    def begin(self) -> None:
        """Starts the child and waits until it can run cases, so that the first takes no longer than it has to."""
        self.prepare()
        # That it has ended, the first case tells.
        with contextlib.suppress(EOFError, OSError):
            self._is_ready()

    def _is_ready(self) -> bool:
        """Waits for a child that begins; whether it has begun in time."""
        assert self._connection is not None
        if not self._ready and self._connection.poll(_START_SECONDS):
            self._connection.recv()
            self._ready = True
        return self._ready

    def _start(self) -> None:
        self._connection, theirs = new_process.context().Pipe()
        self._watch = Watch(new_process.context())
        arguments = (self._subject, theirs)
        self._process = new_process.start(_serve, arguments, AWAY_FROM_OTHERS, daemon=True, watch=self._watch)
        theirs.close()

    def _silent(self) -> float | None:
        """Waits for an answer; seconds without one, where there is none in time."""
        assert self._connection is not None
        assert self._process is not None
        assert self._watch is not None
        began, silent = time.monotonic(), 0.0
        while not self._connection.poll(_LOOK_SECONDS):
            silent = time.monotonic() - began
            if silent > self._watch.patience(self._process.pid, silent, self._soon, self._timeout):
                return silent
        return None

    def _hung(self, seconds: float) -> Report:
        """Ends a child that has said nothing for so long."""
        self.close()
        return Report("Hung", f"the process was silent for {seconds:.0f} seconds", survived=False)

    def end(self) -> None:
        """Ends the child for good: a thread that waits for its answer starts no other."""
        self._ended = True
        self.close()

    def close(self) -> None:
        """Ends the child."""
        if self._process is not None:
            if self._process.pid is not None:
                self._process.kill()
                self._process.join()
            self._process, self._ready = None, False
