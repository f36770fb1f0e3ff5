"""A process beside a worker that compiles configurations ahead, into what their compiler keeps on disk.

Compilers hold locks, start threads and keep state that no fork survives, so nothing is compiled in threads of a worker
or handed over in memory: the worker finds on disk what this process has compiled, to be loaded at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Configuration
from attn_fuzz.campaign import new_process
from attn_fuzz.campaign.configuration_pool import Step
from attn_fuzz.campaign.isolated import AWAY_FROM_OTHERS, Subject
from attn_fuzz.campaign.warm_up import warm_up_cases
from attn_fuzz.execution.compilers import compile_without_end
from attn_fuzz.execution.process import set_apart, set_up_process
from attn_fuzz.generation.domain import Domain
from attn_fuzz.oracle.examine import tried

PATIENCE: Final = 600.0
"""Seconds after which the worker is left to compile a configuration itself, and to be found hung over it; the worst
seen are compilers for GPUs that take minutes."""

_VARIANTS: Final = 30.0
"""Seconds after which no further variant of a configuration is compiled for now: others are worth more."""


Aim = Mapping[str, tuple[Any, ...]]
"""What a campaign's draws are to have, as of ``Domain``: layouts have long documents where these are aimed at."""


def _compile(subject: Subject, aim: Aim, step: Step) -> None:
    """Compiles a configuration, or a layout of it, as far as there is time for its variants."""
    loaded = registry.narrowed(registry.load(subject.backend), subject.without)
    backend, kind = registry.within(loaded, lambda: (step.configuration,)), subject.device.partition(":")[0]
    compile_without_end()
    began = time.monotonic()
    for case in warm_up_cases(step, backend, Domain.of(backend.kernel.capabilities_on(kind), kind, aim=aim)):
        tried(case, backend, subject.device)
        if time.monotonic() - began > _VARIANTS:
            return


def _serve(subject: Subject, aim: Aim, connection: Connection) -> None:
    set_apart()
    set_up_process(subject.device)
    try:
        while True:
            configuration, *more = connection.recv()
            started = time.monotonic()
            # What raises here raises in the worker, too, which makes a finding of it.
            with contextlib.suppress(Exception):
                _compile(subject, aim, Step(Configuration(*configuration), *more))
            connection.send(time.monotonic() - started)
    except (EOFError, OSError, KeyboardInterrupt):
        return


class Ahead:
    """One such process; it starts with its first configuration.

    Args:
        subject: what is compiled.
        aim: of the campaign.
        clock: seconds.
    """

    def __init__(self, subject: Subject, aim: Aim, clock: Callable[[], float] = time.monotonic) -> None:
        self._subject, self._aim, self._clock = subject, aim, clock
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._given = 0.0
        self.at_work: Step | None = None

    def give(self, step: Step) -> None:
        """Begins with a step."""
        if self._process is None:
            self._connection, theirs = new_process.context().Pipe()
            self._process = new_process.start(_serve, (self._subject, self._aim, theirs), AWAY_FROM_OTHERS, daemon=True)
            theirs.close()
        assert self._connection is not None
        self.at_work, self._given = step, self._clock()
        # One that has died is found out when it is asked.
        with contextlib.suppress(OSError):
            self._connection.send((tuple(step.configuration), *step[1:]))

    def taken(self) -> float | None:
        """Seconds that the configuration took, once it is compiled or given up; None until then.

        What the process has died of, or never comes back from, the worker meets and makes a finding of.
        """
        assert self._connection is not None
        spent = self._clock() - self._given
        try:
            if self._connection.poll():
                seconds: float = self._connection.recv()
                self.at_work = None
                return seconds
        except (EOFError, OSError):
            self.close()
            return spent
        if spent <= PATIENCE:
            return None
        self.close()
        return spent

    def close(self) -> None:
        """Ends the process; the next configuration starts another."""
        self.at_work = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
