"""Cases that may take their process with them: each runs in a child that is replaced when it dies."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from attn_fuzz.campaign.worker import DEAD_CONTEXT, context_alive, set_apart, set_up_process
from attn_fuzz.examine import examine
from attn_fuzz.symptoms import Crashed
from backends import registry
from backends.kernel import UnsupportedCase
from reference.case import Case


def _serve(backend: str, device: str, connection: Connection) -> None:
    set_apart()
    set_up_process(device)
    loaded, place = registry.load(backend), torch.device(device)
    while True:
        try:
            case = Case.from_json(connection.recv())
        except EOFError:
            return
        try:
            first = examine(case, loaded, place).first
        except UnsupportedCase:
            first = None
        if isinstance(first, Crashed) and not context_alive(place):
            raise SystemExit(DEAD_CONTEXT)
        connection.send(None if first is None else type(first).__name__)


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
        """Name of the case's first symptom: ``Crashed`` when its process died, ``Hung`` when it went silent."""
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(*self._arguments, theirs), daemon=True)
            self._process.start()
            theirs.close()
        assert self._connection is not None
        try:
            self._connection.send(case.to_json())
            if not self._connection.poll(self._timeout):
                self.close()
                return "Hung"
            found: str | None = self._connection.recv()
        except (EOFError, OSError):
            # OSError: it died before it had read the case, or in the middle of its answer.
            self.close()
            return "Crashed"
        return found

    def close(self) -> None:
        """Ends the child."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
