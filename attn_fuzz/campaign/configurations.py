"""What a worker draws from: all that its backend takes, or a pool of configurations where each has to be compiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Configuration, UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign.compile_ahead import Ahead
from attn_fuzz.campaign.compiling_time import CompilingTime
from attn_fuzz.campaign.configuration_pool import ConfigurationPool, Growth, Step, steps
from attn_fuzz.campaign.isolated import Subject
from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.campaign.warm_up import LAYOUTS, warm_up_cases
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.compilers import compile_without_end
from attn_fuzz.generation.configurations import in_order
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.fixed_calls import together
from attn_fuzz.reference.case import Case

_PLAIN: Final = len(LAYOUTS)
"""Cases that a configuration is compiled by before others of it are drawn."""

COMPILES: Final = 8.0
"""Seconds of compiling after which a turn's draws are cut short: what else is new to them would hold up all that is
compiled."""

_T = TypeVar("_T")


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
        self.compiling = CompilingTime()
        """What this process spends compiling, in calls that are timed."""
        self._turn: tuple[Configuration, str, float] | None = None
        """Whose turn it is, at which level, and what had been spent when it began."""
        self.plain: dict[Configuration, CallBatch] = {}
        """Of each that is ready, the kernel calls that it was compiled by."""
        self.only_ready = False
        """Whether the turn's calls are to be some that everything is compiled for."""
        self._pool: ConfigurationPool | None = None
        self.hurries = False
        """Whether what is met uncompiled is to be left, for a while, to those that compile ahead."""
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
        # A packed call is compiled as a whole, or not at all; single cases are there for what batches do not draw.
        self.hurries = not by_turns and assignment.mode == "batch"
        growth = Growth(load=self._load, seed=assignment.seed, by_turns=by_turns, hurries=self.hurries)
        subject = Subject(assignment.backend, assignment.device, assignment.without)
        beside = 0 if growth.by_turns else assignment.compilers
        compilers = [Ahead(subject, assignment.aim) for _ in range(beside)]
        pool = self._pool = ConfigurationPool(steps(order, stated.layouts, again=not by_turns), compilers, growth)
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
        if self._pool is None:
            return domain
        narrowed = self._pool.narrowed(domain, turn, level)
        (chosen,) = narrowed.capabilities.configurations
        self._turn = chosen, level, self.compiling.spent
        self.only_ready = level == "kernel" and self._pool.only_ready(chosen)
        return narrowed

    def timed(self, judge: Callable[[], _T]) -> _T:
        """What comes of a call; whether something was compiled in it is taken note of."""
        self.compiling.begin()
        try:
            return judge()
        finally:
            self.compiling.end()

    def took(self, *, ready: bool = False) -> float:
        """Ends a turn's draws; seconds that those have spent compiling.

        Args:
            ready: whether there are calls now that everything is compiled for.
        """
        if self._pool is None or self._turn is None:
            return 0.0
        chosen, level, before = self._turn
        self._pool.took(chosen, level, seconds := self.compiling.spent - before, new=not self.only_ready)
        if ready and level == "kernel" and self._job.mode == "batch":
            self._pool.ready.add(chosen)
        self._turn = None
        return seconds

    def level(self, levels: Sequence[str], turn: int) -> str:
        """The level of a turn: its own, or one whose calls are compiled where there is no time to compile more."""
        own = levels[turn % len(levels)]
        if self._pool is None or not self._pool.waits(own):
            return own
        return next((each for each in levels if not self._pool.waits(each)), own)

    def count(self, tally: Tally, case: Case, cases: int = 1) -> None:
        """Counts cases of a configuration, and what compiling has taken so far."""
        if self._pool is not None:
            tally.compiling_seconds = self._pool.waited + self._pool.compiled + self._pool.met
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
        domain = Domain.of(self.backend.kernel.capabilities_on(self._kind), self._kind, aim=self._job.aim)
        plain: list[Case] = []
        # To begin with the first call of all is enough: others are met when they are drawn, or compiled ahead.
        begins = self.hurries and self._pool is not None and not self._pool.waited
        most = 1 if begins else _PLAIN
        for case in itertools.islice(warm_up_cases(step, self.backend, domain), most):
            with contextlib.suppress(UnsupportedCase):
                self._run(case)
                plain.append(case)
        # A case by itself is asked too much to be made again for nothing but its values.
        calls = together(plain) if self._job.mode == "batch" and plain and plain[0].level == "kernel" else None
        if self._pool is not None and calls is not None and not step.layouts:
            self.plain[step.configuration] = calls
            self._pool.ready.add(step.configuration)
