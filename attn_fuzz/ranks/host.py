"""The process that ranks are forked from: it has imported everything once, so that a new team costs milliseconds.

It runs a single thread and never touches a GPU, which is what makes forking safe. It ends, with all ranks, when its
parent does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, Final

_MESSAGE: Final = 1 << 16
_MAX_RANKS: Final = 64


class HostError(RuntimeError):
    """Ranks cannot be started; the message is one sentence."""


class Host:
    """The parent's end: starts the host when the first team is asked for."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        # Standard output belongs to the parent's results.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env={**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        )
        theirs.close()
        self._socket = ours

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> list[int]:
        if self._socket is None:
            self._start()
        assert self._socket is not None
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            reply = self._socket.recv(_MESSAGE)
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
        """Kills ranks; their exit codes, negative for signals, those that had died before being what they died of."""
        return self._ask({"end": pids}, [])

    def close(self) -> None:
        """Ends the host, and with it all ranks."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.wait()
            self._process = None


def _become_rank(seat: dict[str, Any], descriptor: int) -> None:
    from attn_fuzz.ranks.member import Seat, serve

    try:
        serve(Seat(**seat), Connection(descriptor))
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _fork(seats: list[dict[str, Any]], descriptors: list[int], control: socket.socket) -> list[int]:
    pids = []
    for seat, mine in zip(seats, descriptors, strict=True):
        pid = os.fork()
        if pid == 0:
            control.close()
            # A copy of another rank's end would keep the parent from seeing that rank die.
            for other in descriptors:
                if other != mine:
                    os.close(other)
            _become_rank(seat, mine)
        pids.append(pid)
    for descriptor in descriptors:
        os.close(descriptor)
    return pids


def _end(pids: list[int]) -> list[int]:
    for pid in pids:
        # Not reaped yet, so the id is still this child's, dead or alive.
        os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _serve(control: socket.socket) -> None:
    living: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _MESSAGE, _MAX_RANKS)
        if not data:
            _end(sorted(living))
            return
        request = json.loads(data)
        if "fork" in request:
            answer = _fork(request["fork"], descriptors, control)
            living |= set(answer)
        else:
            answer = _end(request["end"])
            living -= set(request["end"])
        control.sendall(json.dumps(answer).encode())


def _prepare() -> None:
    """Whatever takes long the first time, before anybody is forked."""
    import torch

    import attn_fuzz.ranks.member
    import attn_fuzz.ranks.slices  # noqa: F401
    from attn_fuzz.process import set_up_process

    set_up_process("cpu")
    # Switching this on imports a compiler.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    # Ctrl-C is the parent's business; the host ends when the parent does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _control = socket.socket(fileno=int(sys.argv[1]))
    _prepare()
    _serve(_control)
