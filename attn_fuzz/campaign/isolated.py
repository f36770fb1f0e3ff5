"""Cases that may take their process with them: each runs in a child that is replaced when it dies."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Final

import torch

from attn_fuzz.examine import Verdict, examine
from attn_fuzz.process import DEAD_CONTEXT, NO_DEVICE, context_alive, set_apart, set_up_process
from attn_fuzz.symptoms import Crashed, Hung, Symptom
from backends import registry
from backends.kernel import BackendUnavailable, UnsupportedCase
from reference.case import Case

KNOWN_ISSUE: Final = "KnownIssue"
"""Stands for a symptom that a known issue explains."""


class NoDevice(BackendUnavailable):
    """A new process cannot use the device either: what another died of is no kernel's doing."""


def _serve(backend: str, device: str, connection: Connection) -> None:
    set_apart()
    place = torch.device(device)
    try:
        set_up_process(device)
        usable = context_alive(place)
    except Exception:
        # A torch built without CUDA lacks even the function.
        usable = False
    if not usable:
        raise SystemExit(NO_DEVICE)
    loaded = dataclasses.replace(registry.load(backend), isolated=True)
    while True:
        try:
            case = Case.from_json(connection.recv())
        except EOFError:
            return
        try:
            verdict, refusal = examine(case, loaded, place), None
        except UnsupportedCase as error:
            verdict, refusal = Verdict((), {}, frozenset()), str(error)
        first = verdict.first
        if isinstance(first, Crashed) and not context_alive(place):
            raise SystemExit(DEAD_CONTEXT)
        seen = None if first is None else (type(first).__name__, str(first))
        if seen is None and verdict.known:
            seen = (KNOWN_ISSUE, f"known issue: {', '.join(verdict.known)}")
        connection.send((seen, refusal))


@contextlib.contextmanager
def _away_from_others() -> Iterator[None]:
    """Where processes share a GPU through a server (CUDA MPS), a fault in one ends all; not so for a child."""
    before = os.environ.get(_SERVER)
    os.environ[_SERVER] = os.devnull
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SERVER]
        else:
            os.environ[_SERVER] = before


_SERVER: Final = "CUDA_MPS_PIPE_DIRECTORY"


_HUNG: Final = ("Hung", "no answer")
_DIED: Final = ("Crashed", "the process died")

FATAL: Final = ("Crashed", "Hung")
"""Symptoms of cases that are not safe to run in a process with anything else to do."""


class Isolated:
    """Runs cases of one backend in a child process.

    Args:
        backend: its name.
        device: where.
        timeout: seconds after which a case counts as hung.
    """

    def __init__(self, backend: str, device: str, timeout: float) -> None:
        self._arguments, self._timeout = (backend, device), timeout
        self._context = multiprocessing.get_context("spawn")
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def symptom(self, case: Case) -> str | None:
        """Name of the case's first symptom: ``Crashed`` when its process died, ``Hung`` when it went silent.

        Raises:
            NoDevice: when the process could not use its device before there was any case.
        """
        symptom, _ = self._ask(case)
        return None if symptom is None else symptom[0]

    def fatal(self, case: Case) -> Symptom | None:
        """The symptom of a case that ended its process or hung; None for one that came back, whatever it brought."""
        symptom, _ = self._ask(case)
        if symptom == _HUNG:
            return Hung("runs", "process", f"the process was silent for {self._timeout:.0f} seconds")
        return Crashed("runs", "process", "the process died while it ran this case") if symptom == _DIED else None

    def answer(self, case: Case) -> str:
        """In words: ``right``, ``refused: ...``, ``crashed: ...``, ``hung``, ``known issue: ...`` or ``wrong: ...``."""
        symptom, refusal = self._ask(case)
        if refusal is not None:
            return f"refused: {refusal}"
        if symptom is None:
            return "right"
        name, message = symptom
        if name in ("Hung", KNOWN_ISSUE):
            return "hung" if name == "Hung" else message
        return f"crashed: {message}" if name == "Crashed" else f"wrong: {message}"

    def _ask(self, case: Case) -> tuple[tuple[str, str] | None, str | None]:
        """((name, message) of the first symptom or None, why it was refused or None)."""
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(*self._arguments, theirs), daemon=True)
            with _away_from_others():
                self._process.start()
            theirs.close()
        assert self._connection is not None
        try:
            self._connection.send(case.to_json())
            if not self._connection.poll(self._timeout):
                self.close()
                return _HUNG, None
            found: tuple[tuple[str, str] | None, str | None] = self._connection.recv()
        except (EOFError, OSError):
            # OSError: it died before it had read the case, or in the middle of its answer.
            self._process.join()
            without = self._process.exitcode == NO_DEVICE
            self.close()
            if without:
                raise NoDevice(f"a new process cannot use {self._arguments[1]}, whatever it runs there") from None
            return _DIED, None
        return found

    def close(self) -> None:
        """Ends the child."""
        if self._process is not None:
            if self._process.pid is not None:
                self._process.kill()
                self._process.join()
            self._process = None
