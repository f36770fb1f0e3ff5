"""Who works next: what is behind comes first, then what is interesting."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

MODE_SHARES: Final = {"batch": 0.5, "case": 0.3, "packed": 0.2}
"""Of the time. Batches give most verdicts a second, and single cases are asked most."""

CURIOUS: Final = 0.25
"""Share of the slices of a round for what findings, near misses and new behaviour have made interesting."""

MOST_TIMES: Final = 4.0
"""A slow backend is given at most so many times the time that each would have in equal shares, however far it is
behind: to give it as many verdicts as the fastest has would leave nothing for anybody else."""

MOST_SHARE: Final = 0.35
"""And at most this share of a mode's time, where there are few backends."""

NEGLECTED: Final = 0.4
"""Of the median of all backends: one with fewer verdicts than that gets every other slice, of what gives it most."""

COMPILED_SHARE: Final = 1 / 3
"""At most, of the time: for backends that compile for what they are handed, and are behind whatever they get."""

COMPILED_TIMES: Final = 3.0
"""Slices of compiling backends are so many times as long."""

_FORGOTTEN: Final = 0.5
"""What is left of interest after a slice that showed nothing new."""


class Target(NamedTuple):
    """What a slice may be of."""

    backend: str
    device: str
    level: str
    mode: str
    compiled: bool = False
    """It compiles for shapes or options: such are compared among themselves."""

    @property
    def subject(self) -> tuple[str, str]:
        """(backend, ``cpu`` or ``cuda``)."""
        return self.backend, self.device.partition(":")[0]


@dataclasses.dataclass
class Standing:
    """What a target has had until now."""

    cases: float = 0.0
    seconds: float = 0.0
    interest: float = 0.0
    worst: list[float] = dataclasses.field(default_factory=list)
    """Largest errors of its slices, in standard deviations."""
    slices: int = 0
    """That were begun."""
    failures: int = 0
    """Slices in a row that could not run."""
    resting: int = 0
    """Rounds in which it is left out."""

    @property
    def rate(self) -> float | None:
        """Cases a second; None before there was a slice."""
        return self.cases / self.seconds if self.seconds else None

    def foreseen(self, cases: float, seconds: float, planned: float) -> Standing:
        """What it will be once a slice that goes on is done, at the rate that it has had until now.

        Args:
            cases: judged in it until now.
            seconds: that it has taken, more than 0.
            planned: seconds that it is to take.
        """
        lasts = max(seconds, planned)
        return dataclasses.replace(self, cases=self.cases + cases / seconds * lasts, seconds=self.seconds + lasts)

    def failed(self) -> None:
        """A slice could not run: the more often, the longer it rests."""
        self.failures += 1
        self.resting = min(2**self.failures, 64)

    def note(self, cases: int, seconds: float, *, findings: int, fresh: int, worst_z: float) -> None:
        """What came of a slice.

        Args:
            cases: judged in it.
            seconds: that it took.
            findings: new ones.
            fresh: pairs of values, or implementations, that its backend had never reached.
            worst_z: largest error of its clean cases, in standard deviations; 0 for none.
        """
        self.cases += cases
        self.seconds += seconds
        self.failures = 0
        near = is_near_miss(worst_z, self.worst)
        self.interest = _FORGOTTEN * self.interest + findings + near + min(fresh / 100, 0.5)
        if worst_z:
            self.worst = [*self.worst[-63:], worst_z]


_LEAST_NEAR: Final = 5.0
"""Standard deviations; the verdict is at 10, and correct kernels stay below 5 in nearly all slices."""

_USUAL_TIMES: Final = 1.25


def is_near_miss(z: float, earlier: Sequence[float]) -> bool:
    """Whether an error is beyond what is usual for a backend, though no finding."""
    usual = statistics.median(earlier) if earlier else math.inf
    return z > _LEAST_NEAR and z > _USUAL_TIMES * usual


def _by_mode(targets: Iterable[Target]) -> dict[str, list[Target]]:
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(target.mode, []).append(target)
    return found


class Round:
    """Shares out the slices of one round.

    Args:
        standings: of all targets.
        seconds: of a slice.
        begun: targets of slices of the round that are counted in the standings.
        waiting: targets of those that are not.
    """

    def __init__(
        self,
        standings: Mapping[Target, Standing],
        seconds: float,
        *,
        begun: Sequence[Target] = (),
        waiting: Sequence[Target] = (),
    ) -> None:
        self._seconds = seconds
        self._cases = {target: standing.cases for target, standing in standings.items()}
        self._spent = {target: standing.seconds for target, standing in standings.items()}
        self._rates = {target: standing.rate for target, standing in standings.items()}
        self._interest = {target: standing.interest for target, standing in standings.items()}
        self._on_device = Counter(target.device for target in begun)
        self._taken = len(begun) + len(waiting)
        self._targets = [target for target, standing in standings.items() if not standing.resting]
        for target in waiting:
            self._take(target)

    def slices(self, count: int, *, quick_only: bool = False) -> list[Target]:
        """The targets of so many slices, in the order in which they start.

        Args:
            count: of slices.
            quick_only: nothing that compiles, if there is anything else: there is no time for it.
        """
        quick, compiled = ([t for t in self._targets if t.compiled is kind] for kind in (False, True))
        if quick and quick_only:
            compiled = []
        share = min(len(compiled) / max(len(self._targets), 1), COMPILED_SHARE) if quick else 1.0
        # Of the time; of the slices it is less, since theirs are longer.
        by_slices = share / (share + COMPILED_TIMES * (1 - share))
        # One at least, once in a while where a round has few.
        of_compiled = min(count, math.ceil(count * by_slices)) if compiled else 0
        if compiled and quick and count == 1:
            of_compiled = int(self._time(compiled) < share * (self._time(compiled) + self._time(quick)))
        return self._shared(quick, count - of_compiled) + self._shared(compiled, of_compiled)

    def leave_out(self, target: Target) -> None:
        """No more slices of a target in this round, unless there is nothing else: one that is silent takes far longer
        than it was planned to, and another of it would be silent, too."""
        self._targets = [each for each in self._targets if each != target] or self._targets

    def _time(self, targets: Sequence[Target]) -> float:
        return sum(self._spent[target] for target in targets)

    def _shared(self, targets: Sequence[Target], count: int) -> list[Target]:
        """So many slices of some targets."""
        interesting = sorted((t for t in targets if self._interest[t] > 0), key=lambda t: -self._interest[t])
        curious = interesting[: int(count * CURIOUS)]
        for target in curious:
            self._take(target)
        return [self._take(self._next(targets)) for _ in range(count - len(curious)) if targets] + curious

    def _next(self, targets: Sequence[Target]) -> Target:
        """What is behind in its mode, and every other time what is far behind in all modes together, if anything is."""
        self._taken += 1
        return (self._neglected(targets) if self._taken % 2 else None) or self._most_behind(targets)

    def _neglected(self, targets: Sequence[Target]) -> Target | None:
        """Of the backend that is furthest behind what gives it most verdicts a second; None where none is far behind.

        Modes and levels have their turns by ``_most_behind``; these are for backends that are slow in all of them.
        """
        cases, spent = ({target.subject: 0.0 for target in targets} for _ in range(2))
        for target in targets:
            cases[target.subject] += self._cases[target]
            spent[target.subject] += self._spent[target]
        enough, most = NEGLECTED * statistics.median(cases.values()), MOST_TIMES / len(cases) * sum(spent.values())
        # Nothing is gained by more time for what has come to no verdict in the time it had.
        mine = [each for each in targets if self._rates[each] and cases[each.subject] < enough]
        behind = [each for each in mine if spent[each.subject] < most]
        # Of several GPUs the one that has the fewest slices of the round.
        return min(
            behind,
            key=lambda each: (cases[each.subject], -(self._rates[each] or 0.0), self._on_device[each.device]),
            default=None,
        )

    def _take(self, target: Target) -> Target:
        """Counts a slice as if it were done."""
        rates = [rate for other, rate in self._rates.items() if rate is not None and other.mode == target.mode]
        rate, seconds = self._rates[target], self._seconds * (COMPILED_TIMES if target.compiled else 1.0)
        self._cases[target] += seconds * (rate if rate is not None else statistics.median(rates or [1.0]))
        self._spent[target] += seconds
        self._on_device[target.device] += 1
        return target

    def _most_behind(self, targets: Sequence[Target]) -> Target:
        """The mode that has had too little time, in it the backend with the fewest cases, and of that the level.

        Before anything else what has had no time at all.
        """
        modes = _by_mode([target for target in targets if not self._spent[target]] or targets)
        spent_on = {mode: self._time(mine) for mode, mine in _by_mode(targets).items()}
        mine = min(modes, key=lambda mode: spent_on[mode] / MODE_SHARES[mode])
        of_mode = [target for target in targets if target.mode == mine]
        cases, spent, in_all = ({target.subject: 0.0 for target in targets} for _ in range(3))
        for target in targets:
            in_all[target.subject] += self._spent[target]
        for target in of_mode:
            cases[target.subject] += self._cases[target]
            spent[target.subject] += self._spent[target]
        share = max(min(MOST_TIMES / len(cases), MOST_SHARE), 1 / len(cases))
        most = share * (sum(spent.values()) + self._seconds)
        subjects = {target.subject: None for target in modes[mine]}
        allowed = [subject for subject in subjects if spent[subject] < most] or list(subjects)
        subject = min(allowed, key=lambda each: (cases[each], spent[each], in_all[each]))
        return min(
            (target for target in modes[mine] if target.subject == subject),
            # Of several GPUs the one that has the fewest slices of the round.
            key=lambda target: (self._on_device[target.device], self._cases[target], self._spent[target]),
        )
