"""What a worker draws from: all that its backend takes, or a pool of configurations where each has to be compiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Final

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Configuration, UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign.compile_ahead import Ahead
from attn_fuzz.campaign.configuration_pool import ConfigurationPool, Growth, Step, steps
from attn_fuzz.campaign.isolated import Subject
from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.campaign.warm_up import LAYOUTS, warm_up_cases
from attn_fuzz.execution.compilers import compile_without_end
from attn_fuzz.generation.configurations import in_order
from attn_fuzz.generation.domain import Domain
from attn_fuzz.reference.case import Case

_PLAIN: Final = len(LAYOUTS)
"""Cases that a configuration is compiled by before others of it are drawn."""


class Configurations:
    """Those that an assignment is about.

    Args:
        assignment: what is asked for.
        backend: as it was declared and found out to be.
        run: runs a case, so that what it needs is compiled.

    Raises:
        ValueError: when every one has to be compiled, and none is taken.
    """

    def __init__(self, assignment: Assignment, backend: Backend, run: Callable[[Case], object]) -> None:
        self._job, self._run, self._kind = assignment, run, assignment.device.partition(":")[0]
        self.backend = backend
        """One that takes no configuration that is not ready."""
        self._pool: ConfigurationPool | None = None
        stated = backend.kernel.capabilities_on(self._kind)
        # Ranks that share heads would have configurations of their own.
        if not stated.configurations and not (stated.compiles and max(assignment.tensor_ranks) == 1):
            return
        aim = assignment.aim if assignment.compile_aimed else {}
        domain = Domain.of(stated, self._kind, assignment.dtypes, aim=aim)
        kernels = "kernel" in assignment.levels and "kernel" in backend.levels
        order = in_order(domain if kernels else domain.for_layers, assignment.seed)
        # Of so many cases within a time it is a matter of time, too, which come.
        by_turns = assignment.cases is not None and assignment.seconds is None
        growth = Growth(load=self._load, seed=assignment.seed, by_turns=by_turns)
        subject = Subject(assignment.backend, assignment.device, assignment.without)
        beside = 0 if growth.by_turns else assignment.compilers
        compilers = [Ahead(subject) for _ in range(beside)]
        pool = self._pool = ConfigurationPool(steps(order, stated.layouts), compilers, growth)
        self.backend = registry.within(backend, lambda: pool.taken)

    def begin(self) -> bool:
        """Makes the first one ready; whether anything had to be compiled."""
        if self._pool is not None:
            self._pool.begin()
        return self._pool is not None

    def domain(self, turn: int, level: str) -> Domain:
        """What a turn of a level draws from: everything, or one configuration."""
        job, stated = self._job, self.backend.kernel.capabilities_on(self._kind)
        domain = Domain.of(stated, self._kind, job.dtypes, job.ranks, job.tensor_ranks, job.aim)
        return domain if self._pool is None else self._pool.narrowed(domain, turn, level)

    def count(self, tally: Tally, case: Case, cases: int = 1) -> None:
        """Counts cases of a configuration, and what compiling has taken so far."""
        if self._pool is not None:
            tally.compiling_seconds = self._pool.waited + self._pool.compiled
            for configuration in (*self._pool.taken, Configuration.of(case)):
                tally.by_configuration.setdefault(configuration.words(), 0)
            tally.by_configuration[Configuration.of(case).words()] += cases

    def close(self) -> None:
        """Ends the processes beside this one."""
        if self._pool is not None:
            self._pool.close()

    def _load(self, step: Step) -> None:
        """Has a step compiled in this process, or loaded, by its plain cases."""
        compile_without_end()
        domain = Domain.of(self.backend.kernel.capabilities_on(self._kind), self._kind)
        for case in itertools.islice(warm_up_cases(step, self.backend, domain), _PLAIN):
            with contextlib.suppress(UnsupportedCase):
                self._run(case)
