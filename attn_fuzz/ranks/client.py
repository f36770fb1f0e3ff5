"""The parent's end of the process that ranks are forked from (``fork server``)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, Final

from attn_fuzz.execution.child_memory import fill_in_children

MESSAGE: Final = 1 << 16
"""The longest request or answer, in bytes."""

MAX_RANKS: Final = 64
"""The most ranks of a group: each costs a process that has all of torch in it."""

_FORK_SERVER: Final = "attn_fuzz.ranks.fork_server"


class HostError(RuntimeError):
    """Ranks cannot be started; the message is one sentence."""


class Client:
    """Starts the process when the first group is asked for."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        # Standard output belongs to the parent's results.
        self._process = subprocess.Popen(
            [sys.executable, "-m", _FORK_SERVER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env={
                **os.environ,
                **fill_in_children(os.environ),
                "PYTHONPATH": path,
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            },
        )
        theirs.close()
        self._socket = ours

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> list[int]:
        if self._socket is None:
            self._start()
        assert self._socket is not None
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            reply = self._socket.recv(MESSAGE)
        except OSError:
            reply = b""
        if not reply:
            self.close()
            raise HostError("the process that ranks are forked from is gone")
        answer: list[int] = json.loads(reply)
        return answer

    def fork(self, seats: list[dict[str, Any]], descriptors: list[int]) -> list[int]:
        """One process per seat, which serves the connection of that descriptor; their process ids."""
        return self._ask({"fork": seats}, descriptors)

    def end(self, pids: list[int]) -> list[int]:
        """Kills ranks; their exit codes, negative for signals, those that had died before being what they died of.

        Where the process that forked them is gone, so are they, and their ids may be anybody's by now.
        """
        return self._ask({"end": pids}, []) if self._socket is not None else [-signal.SIGKILL] * len(pids)

    def close(self) -> None:
        """Ends the host, and with it all ranks."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.wait()
            self._process = None
