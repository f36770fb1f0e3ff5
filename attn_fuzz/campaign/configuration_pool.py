"""The configurations of a compiling backend that a worker draws from: few at first, more while the campaign lasts.

The first is compiled before the first case. Others are compiled by processes beside the worker (``compile_ahead``), and
join once they are; the worker then loads them, which is cheap where the compiler keeps what it compiles on disk. Where
it does not, or no core is left for such processes, the worker compiles them itself, for a share of its time.

A campaign of so many cases grows at certain turns instead, so that a seed draws the same cases every time. One of so
many seconds goes on with those that are there: which case comes when is then a matter of time, as how many come at all
is, and each of them says all that it takes to run it again.

Of what compiles for shapes, too, each configuration has a single layout at first, and more of them in turn with further
configurations: whatever is ready is drawn at full speed.

What has not been compiled ahead is met by drawn calls. A campaign of so many seconds takes note of it: configurations
whose last turn has compiled little are settled, and where drawn calls have compiled for more than their share of the
time, nothing but those is drawn for a while.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Final, NamedTuple, Protocol

from attn_fuzz.backends.kernel import Configuration
from attn_fuzz.generation.configurations import FIRST
from attn_fuzz.generation.domain import Domain

SHARE: Final = 0.25
"""Of a campaign's time that may go by while it loads configurations, or compiles what cannot be loaded."""

GROWS_EVERY: Final = 16
"""Turns between configurations beyond the first few, where turns decide: what is new has had some of them by then."""

BACKLOG: Final = 3
"""Steps that are compiled and have not joined yet; with so many nobody begins with another one."""

_RELOADED: Final = 0.5
"""Share of what compiling took below which loading counts as such; above it the compiler keeps nothing on disk."""

_SHORT: Final = 1.0
"""Seconds of compiling below which there is nothing to be told from that, and a turn has compiled little."""


class Step(NamedTuple):
    """What is compiled at a time."""

    configuration: Configuration
    layouts: int = 0
    """How many of its layouts there are then, of what compiles for shapes: the last of them is compiled now."""
    again: bool = False
    """It is ready, but for variants that there was no time for."""


def steps(order: Iterator[Configuration], layouts: int, *, again: bool = False) -> Iterator[Step]:
    """What is compiled one after another: configurations, and from the first few on more of those in turn.

    Args:
        order: configurations.
        layouts: how many each has in the end; 0 where shapes are not compiled for.
        again: whether each has a second turn where they are not, for what was left of the first.
    """
    if not layouts:
        first = deque[Configuration]()
        for each in order:
            if again and len(first) == FIRST:
                yield Step(first.popleft(), again=True)
            first.append(each)
            yield Step(each)
        return
    grown: dict[Configuration, int] = {}
    further = True
    while True:
        short = [each for each, number in grown.items() if number < layouts][:FIRST]
        if short and (len(grown) >= FIRST or not further):
            fewest = min(short, key=lambda each: grown[each])
            grown[fewest] += 1
            yield Step(fewest, grown[fewest])
        added = next(order, None) if further else None
        further = added is not None
        if added is not None:
            grown[added] = 1
            yield Step(added, 1)
        elif not short:
            return


class Compiles(Protocol):
    """A process that compiles ahead (``compile_ahead.Ahead``)."""

    at_work: Step | None

    def give(self, step: Step) -> None: ...

    def taken(self) -> float | None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """How a pool grows.

    Attributes:
        load: compiles a step in this process, or loads what has been compiled.
        seed: decides which configuration a turn has.
        by_turns: whether it grows at certain turns, whatever time that takes.
        hurries: whether drawn calls may compile for a share of the time only, too.
        clock: seconds.
    """

    load: Callable[[Step], None]
    seed: int
    by_turns: bool = False
    hurries: bool = True
    clock: Callable[[], float] = time.monotonic


class ConfigurationPool:
    """Configurations that are ready, and those that will be.

    Args:
        order: in which they have their turn (``steps``).
        compilers: that compile ahead; none where this process compiles everything.
        growth: how it grows.

    Raises:
        ValueError: when there is no configuration at all.
    """

    def __init__(self, order: Iterator[Step], compilers: Sequence[Compiles], growth: Growth) -> None:
        self._order, self._compilers, self._growth = order, list(compilers), growth
        first = next(order, None)
        if first is None:
            raise ValueError("there is no configuration that it takes")
        self._first, self._steps = first, 1
        self.taken: tuple[Configuration, ...] = (first.configuration,)
        """Those that cases may have: compiled, or being loaded."""
        self.layouts: dict[Configuration, int] = {}
        """How many layouts of each are ready, of what compiles for them."""
        self.waited = 0.0
        """Seconds that this process has spent compiling and loading."""
        self.compiled = 0.0
        """Seconds that others have spent compiling."""
        self._ahead: deque[tuple[Step, float]] = deque()
        """Compiled by others, with the seconds that it took them."""
        self._began, self._before = growth.clock(), 0.0
        self.met = 0.0
        """Seconds of compiling in drawn calls."""
        self._last: dict[tuple[Configuration, str], float] = {}
        """The same, in the last turn that a configuration had at a level."""
        self.ready = set[Configuration]()
        """Those that have kernel calls which can be made again, with everything compiled."""

    def begin(self) -> None:
        """Makes the first configuration ready, while another begins with the next: what all of them would do at a time
        holds up the first case, for which everybody waits."""
        self._hand_out(1)
        self._load(self._first)
        self._began, self._before = self._growth.clock(), self.waited

    def at(self, turn: int, level: str = "kernel") -> Configuration:
        """The configuration of a turn; layers have only those whose values are as wide as their keys."""
        self._collect()
        if self._growth.by_turns:
            while self._steps < _due(turn) and self._join():
                pass
        elif self._has_time():
            self._join()
        self._hand_out()
        return Random(f"{self._growth.seed} {turn}").choice(self._drawn_from(level))

    def took(self, configuration: Configuration, level: str, seconds: float, *, new: bool = True) -> None:
        """Takes note of what a turn has spent compiling in drawn calls; ``new``: not only those that are ready."""
        self.met += seconds
        if new:
            self._last[configuration, level] = seconds

    def waits(self, level: str) -> bool:
        """Whether any calls of a level would compile, which there is no time for now."""
        return not self._may_meet() and not self._without_compiling(level)

    def only_ready(self, configuration: Configuration) -> bool:
        """Whether new kernel calls of a configuration would compile, which there is no time for now."""
        return not self._may_meet() and configuration in self.ready and configuration not in self._settled("kernel")

    def _fitting(self, level: str) -> Sequence[Configuration]:
        return [each for each in self.taken if level == "kernel" or each.head_dim_v is None] or self.taken

    def _settled(self, level: str) -> list[Configuration]:
        found = []
        for each in self._fitting(level):
            # What calls of a layout take is compiled before it is drawn; all else has to show it.
            untried = 0.0 if level == "kernel" and each in self.layouts else _SHORT
            found += [each] if self._last.get((each, level), untried) < _SHORT else []
        return found

    def _without_compiling(self, level: str) -> list[Configuration]:
        settled, ready = self._settled(level), self.ready if level == "kernel" else set[Configuration]()
        return [each for each in self._fitting(level) if each in settled or each in ready]

    def _may_meet(self) -> bool:
        """Whether drawn calls have compiled for a small enough share of the time since the first of all."""
        if self._growth.by_turns or not self._growth.hurries:
            return True
        return self.met <= SHARE * (self._growth.clock() - self._began)

    def _drawn_from(self, level: str) -> Sequence[Configuration]:
        fitting = self._fitting(level)
        if self._may_meet():
            return fitting
        if some := self._without_compiling(level):
            return some
        # The one that has the least left to compile, of those that have had a turn.
        tried = [each for each in fitting if (each, level) in self._last]
        return [min(tried, key=lambda each: self._last[each, level])] if tried else fitting[:1]

    def narrowed(self, domain: Domain, turn: int, level: str = "kernel") -> Domain:
        """What a turn of a level draws from."""
        chosen = self.at(turn, level)
        layouts = self.layouts.get(chosen, domain.capabilities.layouts)
        capabilities = dataclasses.replace(domain.capabilities, configurations=(chosen,), layouts=layouts)
        return dataclasses.replace(domain, capabilities=capabilities, dtypes=(chosen.dtype,))

    def close(self) -> None:
        """Ends those that compile ahead; what they were at is compiled here in its turn."""
        left = [each.at_work for each in self._compilers if each.at_work is not None]
        left += [step for step, _ in self._ahead]
        for compiler in self._compilers:
            compiler.close()
        self._compilers.clear()
        self._ahead.clear()
        self._order = itertools.chain(left, self._order)

    def _has_time(self) -> bool:
        """Whether the time that configurations have taken since the first is a small enough share of all."""
        elapsed = self._growth.clock() - self._began
        return self.waited - self._before <= SHARE * elapsed

    def _hand_out(self, most: int | None = None) -> None:
        """Gives those that compile ahead something to do, or the first of them."""
        idle = (each for each in self._compilers[:most] if each.at_work is None)
        for compiler in idle if len(self._ahead) < BACKLOG else ():
            if (step := next(self._order, None)) is not None:
                compiler.give(step)

    def _collect(self) -> None:
        """Takes note of what has been compiled."""
        for compiler in self._compilers:
            step = compiler.at_work
            if step is not None and (seconds := compiler.taken()) is not None:
                self.compiled += seconds
                self._ahead.append((step, seconds))

    def _join(self) -> bool:
        """Loads the next configuration, which is drawn from now on; False where there is none yet."""
        if self._compilers:
            step, ahead = self._ahead.popleft() if self._ahead else (None, 0.0)
        else:
            step, ahead = next(self._order, None), 0.0
        if step is None:
            return False
        self._steps += 1
        if step.configuration not in self.taken:
            self.taken = (*self.taken, step.configuration)
        if self._load(step) > _RELOADED * ahead > _RELOADED * _SHORT:
            # Nothing is kept on disk: what others compile is compiled here once more.
            self.close()
        return True

    def _load(self, step: Step) -> float:
        began = self._growth.clock()
        self._growth.load(step)
        if step.layouts:
            # Others may have come before.
            self.layouts[step.configuration] = max(step.layouts, self.layouts.get(step.configuration, 0))
        seconds = self._growth.clock() - began
        self.waited += seconds
        return seconds


def _due(turn: int) -> int:
    """How many configurations a turn chooses from, where turns decide: one more each turn until there are a few."""
    return min(turn + 1, FIRST) + max(0, turn + 1 - FIRST) // GROWS_EVERY
