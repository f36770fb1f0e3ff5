"""New processes: forked from one that has imported everything once, where the system can.

Importing torch and this package takes seconds, and a campaign starts a process per worker, per limit that it tries and
per crash that it looks into. The process that they are forked from runs a single thread, no operation and no code under
test, and never touches a GPU, which is what makes forking safe. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Final

from attn_fuzz.campaign.orphans import end_with_parent
from attn_fuzz.campaign.watch import Watch, tell_where
from attn_fuzz.execution.child_memory import fill_in_children, keep_in_children

_IMPORTED: Final = (
    "attn_fuzz.campaign.serve",
    "attn_fuzz.campaign.isolated",
    # By torch itself, in the first backward that is handed a gradient: half a second.
    "torch.fx.experimental.symbolic_shapes",
)
"""By the process that others are forked from; what these import comes with them. What is not there is left out."""

_STARTING: Final = threading.Lock()
"""The environment is the whole process's: children are started one after another, of whatever thread."""


@functools.cache
def context() -> ForkServerContext | SpawnContext:
    """How processes are started: forked from a process of their own, or anew where the system has no such thing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(_IMPORTED))
    return found


@contextlib.contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    """What processes that are started here find in their environment; this process's own is as before afterwards."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _same_packages() -> dict[str, str]:
    """Has a new interpreter import what this one does, whatever lies in the working directory."""
    path = [str(Path(entry or os.curdir).absolute()) for entry in sys.path]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def _of_memory() -> dict[str, str]:
    """What is added to the environment of every process that is started here."""
    return {**keep_in_children(os.environ), **fill_in_children(os.environ)}


def prepare() -> None:
    """Starts the process that others are forked from while this one still imports what it needs itself."""
    with _STARTING:
        _ensure_running(_of_memory())


def _ensure_running(added: Mapping[str, str]) -> None:
    """Starts the process that others are forked from, unless it runs: the C library reads its environment once."""
    if isinstance(context(), ForkServerContext):
        with _environment({**added, **_same_packages()}):
            multiprocessing.forkserver.ensure_running()


def start(
    target: Callable[..., object],
    args: tuple[Any, ...],
    added: Mapping[str, str],
    *,
    daemon: bool = False,
    watch: Watch | None = None,
) -> BaseProcess:
    """A new process, with this one's environment as it is now.

    Args:
        target: its main function, of a module.
        args: what it is called with.
        added: to its environment.
        daemon: it is ended with this process, and has no children.
        watch: what asks it where it is.
    """
    added = {**_of_memory(), **added}
    environment = {**os.environ, **added}
    told = None if watch is None else watch.theirs
    process = context().Process(target=_enter, args=(environment, _Streams(), told, target, args), daemon=daemon)
    with _STARTING:
        _ensure_running(added)
        # Read at once by a process that is started anew.
        with _environment(added):
            process.start()
    if told is not None:
        told.close()
    return process


def pool(workers: int) -> ProcessPoolExecutor:
    """So many new processes for work that comes bit by bit; they start when there is some."""
    # For all processes that this one starts from now on: the executor does so when it likes.
    os.environ.update(_of_memory())
    with _STARTING:
        _ensure_running({})
    return ProcessPoolExecutor(
        workers, mp_context=context(), initializer=_take_environment, initargs=(dict(os.environ),)
    )


def _take_environment(environment: Mapping[str, str]) -> None:
    """Gives a new process its parent's environment, instead of that of the one it was forked from."""
    os.environ.clear()
    os.environ.update(environment)


class _Streams:
    """Standard output and standard error of this process as they are now, handed over to one that is being started.

    The process that others are forked from keeps those that it was started with.
    """

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        if isinstance(context(), ForkServerContext):
            return _take_streams, tuple((number, DupFd(number)) for number in (1, 2))
        return _take_streams, ()


def _take_streams(*streams: tuple[int, Any]) -> None:
    for number, theirs in streams:
        descriptor = theirs.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)


def _enter(
    environment: Mapping[str, str],
    streams: object,
    told: Connection | None,
    target: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    """The main function of a new process."""
    del streams
    end_with_parent()
    if told is not None:
        tell_where(told)
    _take_environment(environment)
    target(*args)
