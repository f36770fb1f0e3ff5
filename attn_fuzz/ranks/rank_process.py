"""What runs in a rank's process: it waits for calls, makes them, and tells what came out."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
import torch.distributed as dist

from attn_fuzz.backends.collectives import Collectives, Distributed
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.execution.origin import place_of
from attn_fuzz.execution.process import first_line, lacks_memory, set_up_process
from attn_fuzz.ranks.pickling import packed, unpacked
from attn_fuzz.ranks.progress import Counted, Progress

_LOOPBACK: Final = {"linux": "lo", "darwin": "lo0"}


@dataclasses.dataclass(frozen=True)
class Seat:
    """Where a rank sits."""

    rank: int
    ranks: int
    device: str
    """``cpu`` or ``cuda:N``."""
    transport: str
    """``gloo`` or ``nccl``."""
    store: str
    """File through which the ranks of a group find one another."""
    progress: str
    """File in which they count their collectives."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a rank raised."""

    type: str
    message: str
    kind: str
    """``refused``, ``memory`` for a lack of it, ``misshapen`` for a result that is none, or ``error``."""
    place: str = ""
    """Where in somebody's own file, in words."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(type(error).__name__, first_line(error), _kind(error), place_of(error))


def _kind(error: BaseException) -> str:
    if isinstance(error, (UnsupportedCase, NotImplementedError)):
        return "refused"
    if isinstance(error, MisshapenResult):
        return "misshapen"
    return "memory" if lacks_memory(error) else "error"


@dataclasses.dataclass(frozen=True)
class Here:
    """This process, for the functions that it is asked to call."""

    device: torch.device
    collectives: Collectives


_here: Here | None = None


def here() -> Here:
    """This rank.

    Raises:
        RuntimeError: in a process that is none.
    """
    if _here is None:
        raise RuntimeError("this process is no rank")
    return _here


def _join(seat: Seat) -> Here:
    if sys.platform in _LOOPBACK:
        # Ranks are neighbours; a host name that does not resolve is no reason to fail.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK[sys.platform])
    set_up_process(seat.device)
    device = torch.device(seat.device)
    dist.init_process_group(
        seat.transport,
        store=dist.FileStore(seat.store, seat.ranks),
        rank=seat.rank,
        world_size=seat.ranks,
        # The parent decides when a rank hangs, and ends it.
        timeout=timedelta(hours=1),
        device_id=device if seat.transport == "nccl" else None,
    )
    group = dist.group.WORLD
    assert group is not None
    return Here(device, Counted(Distributed(group), Progress(seat.progress, seat.ranks), seat.rank))


def serve(seat: Seat, connection: Connection) -> None:
    """Makes calls until the parent is gone; ``(function, arguments)`` in, a result or a ``Failure`` out."""
    global _here
    _here = _join(seat)
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        try:
            function: Callable[..., Any]
            function, arguments = unpacked(data)
            answer = function(*arguments)
        except Exception as error:
            answer = Failure.of(error)
        connection.send_bytes(packed(answer))
