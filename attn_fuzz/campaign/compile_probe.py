"""Whether a kernel compiles, and for what: the first call of a configuration is far slower than the next.

The calls that find out its limits show it, so that a kernel that does not compile is asked nothing more. Of Triton's
kernels it is known without a clock, even where they are found compiled on disk. Two configurations have to agree: a
machine that is busy for a moment makes no compiler of a kernel. Then it is asked what else it compiles for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign.isolated import FATAL, Report
from attn_fuzz.generation.domain import Domain
from attn_fuzz.reference.case import Case

TIMES: Final = 4.0
"""A first call so many times as slow as the next has compiled: caches, autotuned or not, take twice as long at most."""

LEAST: Final = 0.2
"""Seconds between the two at least: compilers take more, and what takes less need not be compiled ahead."""

_LONG: Final = 4.0
"""Seconds of compiling for a memory layout from which on few of them are drawn: there are eight."""

_FEW_MEMORIES: Final = ("contiguous", "sliced")

_LAYOUTS: Final = 12
"""Where shapes are compiled for, from so many layouts is drawn."""

_BY_LAYOUT: Final[Mapping[str, Any]] = {"layouts": _LAYOUTS, "capacity": False}
"""Capabilities of what compiles for shapes."""

_SIZES: Final = (0, 7, 64)
"""Of windows, where they are compiled for."""

Ask = Callable[[Case], Report]


def slower(first: float, again: float) -> bool:
    """Whether a first call in seconds is so much slower than the next that something was compiled in it."""
    return first - again > LEAST and first > TIMES * again


def compiled_in(report: Report, case: Case, ask: Ask) -> bool:
    """Whether something was compiled for a case; what took long is asked again.

    Args:
        report: what came of the case.
        case: which.
        ask: runs it once more, in the same process.
    """
    if report.variants or report.seconds <= LEAST:
        return bool(report.variants)
    return slower(report.seconds, ask(case).seconds)


def _came_back(report: Report) -> bool:
    """Whether a case was taken, be its results right or wrong: something that is wrong compiles, too."""
    return report.survived and report.refusal is None and report.symptom not in FATAL


class Noticed:
    """Configurations that came back right, and those that something was compiled for, right or wrong."""

    def __init__(self) -> None:
        self._right = set[Configuration]()
        self._compiled = set[Configuration]()
        self._long = False
        """Whether memory layouts take long to compile for."""

    def note(self, case: Case, report: Report, ask: Ask) -> Report:
        """Takes note of what came of a case, and gives it back; ``ask`` runs it once more, in the same process."""
        if _came_back(report):
            configuration, compiled = Configuration.of(case), compiled_in(report, case, ask)
            if case.memory == "contiguous":
                self._right.update([configuration] if report.symptom is None else [])
                self._compiled.update([configuration] if compiled else [])
            elif compiled and case.memory not in _FEW_MEMORIES:
                self._long |= report.seconds > _LONG
        return report

    def compiles(self, stated: Capabilities) -> bool:
        """Whether it is stated, or two of them show it."""
        if stated.configurations:
            return False
        return len(self._compiled) >= 2 if stated.compiles is None else stated.compiles

    def found(self, stated: Capabilities, also: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Capabilities of one that compiles, and what it also compiles for: those come first that have been taken."""
        # Threads ask side by side, in whatever order.
        found: dict[str, Any] = {
            "compiles": True,
            "compiled_first": tuple(sorted(self._right, key=Configuration.place)),
        }
        if self._long:
            found["memories"] = tuple(memory for memory in stated.memories if memory in _FEW_MEMORIES)
        for each in also:
            found.update(each)
        return found


@dataclasses.dataclass(frozen=True)
class AlsoFor:
    """Something that a kernel may compile for beside configurations.

    Attributes:
        cases: of which the last is new in nothing else; some compilers compile once for the first value, and once more
            for all others.
        found: capabilities of a kernel that compiles for it.
    """

    cases: tuple[Case, ...]
    found: Mapping[str, Any]

    def asked(self, ask: Ask) -> Mapping[str, Any]:
        """What is found out, where something is."""
        *_, last = [ask(case) for case in self.cases]
        if not _came_back(last):
            return {}
        return self.found if compiled_in(last, self.cases[-1], ask) else {}


@dataclasses.dataclass(frozen=True)
class Variants(AlsoFor):
    """Something whose variants are many: what the compiler knows of a shape, call after call, is nearly always new."""

    def asked(self, ask: Ask) -> Mapping[str, Any]:
        """What is found out, where most of the later cases are still compiled for, of those that there was time for."""
        compiled, spent = list[bool](), 0.0
        for case in self.cases:
            report = ask(case)
            if not _came_back(report):
                return {}
            compiled.append(compiled_in(report, case, ask))
            spent += report.seconds * compiled[-1]
            if spent > _TOO_LONG:
                break
        later = compiled[len(compiled) // 2 :]
        return self.found if 2 * sum(later) > len(later) else {}


_TOO_LONG: Final = 40.0
"""Seconds of compiling after which it is known that a kernel's variants take too long to be met by the way."""

# What compilers tell apart: one, multiples of 16, whole tiles, and which side is longer. A few variants are met by the
# first half.
_VARIED: Final = (33, 1, 16, 64, 5, 128, 17, 2, 80, 160, 3, 65, 48, 129)


# None is 1, nor a multiple of 16, and the last are no more than the second: those are variants, of which there are few.
_LENGTHS: Final = ((7, 20), (3, 40, 2, 9), (51, 11))
_SCALES: Final = (0.25, 0.125, 0.5)
_SIDES: Final = (7, 9, 20)


def also_for(base: Case, backend: Backend, domain: Domain) -> list[AlsoFor]:
    """What a kernel that compiles is asked beside what it states.

    Args:
        base: a case of a configuration that is compiled.
        backend: which.
        domain: of what it states.
    """

    def taken(case: Case) -> bool:
        return backend.refusal(case, domain.device) is None

    asked = [also for also in _also_for(base, domain.capabilities) if all(map(taken, also.cases))]
    if not domain.capabilities.layouts and base.level == "kernel":
        varied = tuple(_varied(base, taken))
        # Where many are refused, too few are left to tell.
        asked += [Variants(varied, _BY_LAYOUT)] if len(varied) >= len(_VARIED) // 2 else []
    return asked


def _varied(base: Case, taken: Callable[[Case], bool]) -> Iterator[Case]:
    """Single documents; with as many keys as queries where no others are taken."""
    turned = (*_VARIED[5:], *_VARIED[:5])
    for queries, keys in zip(_VARIED, turned, strict=True):
        pair = (base.replace(lengths=(queries,), key_lengths=(count,)) for count in (keys, queries))
        yield from itertools.islice(filter(taken, pair), 1)


def _also_for(base: Case, stated: Capabilities) -> Iterator[AlsoFor]:
    if not stated.layouts and base.level == "kernel":
        lengths = tuple(base.replace(lengths=lengths) for lengths in _LENGTHS)
        yield AlsoFor(lengths, _BY_LAYOUT)
    if stated.scale:
        yield AlsoFor(tuple(base.replace(scale=scale) for scale in _SCALES), {"scale": False})
    if stated.window and base.causal and not stated.window_sizes:
        yield AlsoFor(tuple(base.replace(window=(side, -1)) for side in _SIDES), {"window_sizes": _SIZES})


def together(compiles: Mapping[str, Any], without: Mapping[str, Any]) -> dict[str, Any]:
    """What was found out about compiling, and about limits: of memory layouts those that both leave."""
    found = {**compiles, **without}
    if "memories" in compiles and "memories" in without:
        found["memories"] = tuple(memory for memory in compiles["memories"] if memory in without["memories"])
    return found
