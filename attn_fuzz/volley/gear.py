"""A volley from end to end: run its calls, judge every document of every call, and wait for the device once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import torch

from attn_fuzz.checks.budget import LIMIT, limit
from attn_fuzz.symptoms import (
    DeadRowsNotZero,
    NotIsolated,
    PoisonLeaked,
    Symptom,
    WrongSpread,
    wrong_tensor,
)
from attn_fuzz.volley.layouts import Volley
from attn_fuzz.volley.questions import APART, NAMES, PROBED, QUESTIONS, TAILS, Firing
from attn_fuzz.wide.judge import COLUMNS, largest_z, screened_z
from backends.registry import Backend
from reference.answer import Inputs
from reference.case import Case
from reference.screen import SUSPICIOUS, takes

_EXACT: Final[dict[str, type[Symptom]]] = {"bits": PoisonLeaked, APART: NotIsolated, TAILS: DeadRowsNotZero}


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a backend made of a volley."""

    volley: Volley
    z: torch.Tensor
    """float64 ``[documents, len(NAMES)]`` on the CPU; inf where something exact is wrong."""
    broken: dict[int, str]
    """Calls that raised or gave something else than was asked for, in words."""
    refused: dict[int, str]
    """Calls that the backend refused."""
    touched: bool
    """Some input, gap or prefix sum has other bits than before; nobody knows which call's work that was."""
    paths: frozenset[str]
    turn: Turn
    """What was asked."""
    spares: tuple[int, ...]
    """Rows behind the last document that calls were handed in some run; empty for none."""
    symptoms: Mapping[str, type[Symptom]]
    """What the probe calls a result that fails it."""

    def call(self, index: int) -> Case:
        """One of the calls as a case of its own, such as the narrow gear may show to fail."""
        small = self.volley.call(index)
        return small.replace(capacity=self.spares[index]) if self.spares else small

    def symptom(self, name: str) -> type[Symptom]:
        """What a call is accused of whose largest deviation is in that column of ``NAMES``."""
        if name in PROBED:
            return self.symptoms[name.split()[0]]
        return _EXACT.get(name) or (WrongSpread if name.endswith("-rows") else wrong_tensor(name))

    def worst(self) -> list[tuple[float, str]]:
        """Of every call: the largest deviation in units in which the verdict is at LIMIT, and whose it is."""
        found = []
        for index, (begin, end) in enumerate(self.volley.spans):
            if index in self.broken:
                found.append((torch.inf, self.broken[index]))
                continue
            own = self.z[begin:end]
            if index in self.refused or not own.numel():
                found.append((0.0, ""))
                continue
            largest, column = own.amax(0).max(0)
            found.append((largest.item(), NAMES[int(column)]))
        return found

    def largest(self) -> dict[str, tuple[float, int]]:
        """Of each result: its largest deviation in the same units, and the call in which it was seen."""
        ends = torch.tensor(self.volley.ends)
        z = self.z.clone()
        for index in self.refused | self.broken:
            z[slice(*self.volley.spans[index])] = 0.0
        worst, places = z.max(0)
        calls = torch.searchsorted(ends, places, right=True).tolist()
        return {
            name: (z, index)
            for name, z, index in zip(NAMES, worst.tolist(), calls, strict=True)
            if name in COLUMNS and name != "bits"
        }

    def failing(self) -> list[int]:
        """Calls that are beyond the limit, worst first."""
        worst = self.worst()
        beyond = [index for index, (z, _) in enumerate(worst) if z > LIMIT]
        return sorted(beyond, key=lambda index: -worst[index][0])


class Turn(NamedTuple):
    """What is asked of a volley, beside the budgets."""

    poison: str
    """Contents of unwritten memory when the drawn values run."""
    asked: str = ""
    """One of ``QUESTIONS``."""
    careful: bool = False
    """Float64 from the first look on, and the statistic of rows, also where a fast look would do."""


TURNS: Final = (
    Turn("nan", "keys"),
    Turn("finite", "inference", careful=True),
    Turn("nan", "needle", careful=True),
    Turn("finite", "again"),
    Turn("nan", "keys"),
    Turn("finite", "documents apart"),
    Turn("nan", "every row"),
    Turn("finite", "some gradients", careful=True),
    Turn("nan", "keys"),
    Turn("finite", "turned"),
    Turn("nan", "swamping", careful=True),
    Turn("finite", "second backward", careful=True),
    Turn("nan", "keys"),
    Turn("finite", "future apart"),
    Turn("nan", "needle", careful=True),
    Turn("finite", "capacity"),
    Turn("nan", "other scale"),
)
"""Of every campaign, in turn: a further run costs as much as the drawn values' own, and a volley more is worth more."""


def judge(
    volley: Volley,
    backend: Backend,
    device: torch.device,
    turn: Turn = TURNS[0],
    beat: Callable[[], None] = lambda: None,
) -> Judged:
    """Runs every call with drawn values, and whatever else it is the turn of, from poisoned memory; judges all of it.

    Every document's results are held to the budget, element by element and row by row, and what the turn asks to what
    is exactly right.

    Args:
        volley: the calls.
        backend: what runs them.
        device: where.
        turn: what is asked.
        beat: called before every call of every run.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    firing = Firing(volley, backend, device, turn.poison, beat)
    QUESTIONS[turn.asked](firing)
    case = volley.case
    z = torch.zeros(len(case.packed_lengths), len(NAMES), dtype=torch.float64, device=device)
    fast = not turn.careful and _looks_fast(firing)
    by_budget = _fast_z(firing) if fast else largest_z(case, firing.drawn, firing.profile, firing.held)
    z[:, : len(COLUMNS)] = torch.cat([by_budget, *firing.deviations]).amax(0) * (LIMIT / limit(case))
    for name, documents in firing.accused.items():
        z[:, NAMES.index(name)] = documents
    touched = torch.stack([each.changed() for each in firing.placed]).any()
    # The one transfer: everything before it was only queued.
    flat = torch.cat([z.flatten(), touched[None].double()]).cpu()
    broken: dict[int, str] = {}
    refused: dict[int, str] = {}
    for fired in firing.runs:
        broken = fired.broken | broken
        refused |= fired.refused
    paths = frozenset().union(*(fired.paths for fired in firing.runs))
    found = flat[:-1].view(z.shape)
    if fast:
        _look_again(firing, found, {*broken, *refused})
    return Judged(volley, found, broken, refused, bool(flat[-1]), paths, turn, firing.spares, firing.symptoms)


def _looks_fast(firing: Firing) -> bool:
    """Whether the fast reference takes the volley, of one of the few head dimensions that it is compiled for."""
    return firing.case.head_dim % 16 == 0 and takes(firing.case, firing.profile, firing.device) is None


def _fast_z(firing: Firing) -> torch.Tensor:
    # Half precision is exact in float32, and one dtype takes half of the compiler's time.
    named = (getattr(firing.drawn, name).float() for name in ("q", "k", "v", "dout"))
    return screened_z(firing.case, Inputs(*named), firing.profile, firing.held)


def _look_again(firing: Firing, z: torch.Tensor, calls: set[int]) -> None:
    """What looks suspicious to the fast reference is for the exact one to say; of clean volleys it is not asked.

    Args:
        firing: what was judged.
        z: ``[documents, len(NAMES)]`` on the CPU, which is put right.
        calls: those that nobody asks about.
    """
    budgets = len(COLUMNS) - 1
    suspicious = (z[:, :budgets] > SUSPICIOUS * LIMIT).any(1)
    for index in calls:
        suspicious[slice(*firing.volley.spans[index])] = False
    if documents := suspicious.nonzero()[:, 0].tolist():
        exact = largest_z(firing.case, firing.drawn, firing.profile, firing.held, documents=documents)
        looked = torch.cat([exact, *firing.deviations]).amax(0)[documents, :budgets]
        z[documents, :budgets] = looked.cpu() * (LIMIT / limit(firing.case))
