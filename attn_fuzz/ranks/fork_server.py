"""The process that ranks are forked from: it has imported everything once, so that a new group costs milliseconds.

It runs a single thread and never touches a GPU, which is what makes forking safe. It ends, with all ranks, when its
parent (``client``) does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import attn_fuzz.ranks.rank_run  # noqa: F401  ranks are asked for its functions, and it takes seconds to import
from attn_fuzz.execution.poison import POISONS, poisoned
from attn_fuzz.execution.process import set_up_process
from attn_fuzz.execution.signals import die_with_parent
from attn_fuzz.ranks.client import MAX_RANKS, MESSAGE
from attn_fuzz.ranks.rank_process import Seat, serve


def _become_rank(seat: dict[str, Any], descriptor: int) -> None:
    # A rank that waits for others for ever must not outlive who could end it.
    die_with_parent()
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
    stores: set[Path] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, MESSAGE, MAX_RANKS)
        if not data:
            _end(sorted(living))
            # A parent that was killed has cleaned up nothing.
            for store in stores:
                shutil.rmtree(store.parent, ignore_errors=True)
            return
        request = json.loads(data)
        if "fork" in request:
            answer = _fork(request["fork"], descriptors, control)
            living |= set(answer)
            stores |= {Path(seat["store"]) for seat in request["fork"]}
        else:
            answer = _end(request["end"])
            living -= set(request["end"])
        control.sendall(json.dumps(answer).encode())


def _prepare() -> None:
    """What takes long the first time, before a process is forked."""
    set_up_process("cpu")
    for poison in POISONS:
        with poisoned(poison, torch.device("cpu")):
            pass


if __name__ == "__main__":
    # Ctrl-C is the parent's business; the host ends when the parent does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _control = socket.socket(fileno=int(sys.argv[1]))
    _prepare()
    _serve(_control)
