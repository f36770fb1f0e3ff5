"""What a worker is told, and what it tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from attn_fuzz.coverage.counts import Reached
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.findings.finding import Finding


class CampaignError(RuntimeError):
    """A campaign cannot do what was asked; the message is one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """One worker's job: one backend on one device."""

    backend: str
    device: str
    seed: int
    levels: tuple[str, ...] = ("layer", "kernel")
    dtypes: tuple[str, ...] = ()
    """None: all that the backend takes."""
    ranks: tuple[int, ...] = (1,)
    """How many ranks layer cases are spread over; one of these."""
    tensor_ranks: tuple[int, ...] = (1,)
    """Over how many ranks each of those spreads its query heads; one of these."""
    cases: int | None = None
    """Stop after so many cases in all levels together."""
    seconds: float | None = None
    """Stop after so long."""
    poisons: tuple[str, ...] = POISONS
    mode: str = "case"
    """``case``: one drawn case after another; ``packed``: cases of thousands of documents; ``batch``: hundreds of
    small calls at a time."""
    asked: tuple[str, ...] = ()
    """What every case is asked beside its budgets, of ``coverage.axes.ASKED``, or every batch, of its schedules; none
    for some of all, in turn."""
    stop_at_first: bool = False
    """End the assignment with the first finding."""
    compilers: int = 1
    """Processes beside this one that compile ahead, where its backend compiles."""
    without: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of a user's backend: capabilities as they were found out (``campaign.limits``)."""
    found: tuple[str, ...] = ()
    """Symptoms that have been found often enough: cases that show one are counted, and not shrunk again."""
    aim: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """What draws are to have where they can (``generation.domain.Domain.aim``)."""
    compile_aimed: bool = False
    """Of a backend that compiles, configurations that have it are compiled, instead of those that cover most."""
    memory: int = 0
    """Bytes that the process may have: what asks for more is refused, instead of filling the machine; 0 for any."""
    counts: bool = False
    """Tell which values of axes were reached."""
    notes: str = ""
    """Beginning of the names of files in which is written what runs and what was found, before it is told
    (``campaign.notes``); empty for none."""
    label: str = ""
    """What it is done for, in the words of whoever wants it."""


@dataclasses.dataclass
class Tally:
    """What has been done so far."""

    cases: int = 0
    documents: int = 0
    straddling: int = 0
    """Layer cases in which a document straddles a cut."""
    refused: int = 0
    """Draws that the backend declares it does not take."""
    why_refused: str = ""
    """What most of them were refused for, where nothing was taken."""
    repeated: int = 0
    """Failing cases that showed a symptom already found."""
    seconds: float = 0.0
    warm_up_seconds: float = 0.0
    """What compiling took before the first case, not part of ``seconds``."""
    compiling_seconds: float = 0.0
    """What all processes together have spent compiling configurations and loading them, the warm-up included."""
    by_configuration: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of a backend that compiles: cases by configuration, those that have had none yet included."""
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    """Cases by ``level dtype``."""
    worst_z: dict[str, float] = dataclasses.field(default_factory=dict)
    """Largest error of clean cases in budget standard deviations, by ``level dtype tensor``."""
    worst_case: dict[str, str] = dataclasses.field(default_factory=dict)
    """The case, as JSON, in which each of those was seen."""
    paths: dict[str, int] = dataclasses.field(default_factory=dict)
    """Cases by implementation that ran."""
    known: dict[str, int] = dataclasses.field(default_factory=dict)
    """Cases that ran into a known issue, by issue."""
    counted: dict[str, int] = dataclasses.field(default_factory=dict)
    """How often something was asked of which there is a count, and how it went (``oracle.trial.Trial.counted``)."""
    histograms: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Elements of clean kernel cases by z, by ``dtype tensor``."""

    def count_elements(self, key: str, counts: list[int]) -> None:
        """Adds a histogram to those of its kind."""
        mine = self.histograms.setdefault(key, [0] * len(counts))
        self.histograms[key] = [a + b for a, b in zip(mine, counts, strict=True)]

    def count(self, counted: Mapping[str, int]) -> None:
        """Adds what a case or a batch has counted."""
        for key, number in counted.items():
            self.counted[key] = self.counted.get(key, 0) + number

    def add(self, other: Tally) -> None:
        """Takes another worker's share in."""
        for name in ("cases", "documents", "straddling", "refused", "repeated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.why_refused = self.why_refused or other.why_refused
        self.seconds = max(self.seconds, other.seconds)
        self.warm_up_seconds = max(self.warm_up_seconds, other.warm_up_seconds)
        self.compiling_seconds += other.compiling_seconds
        for name in ("by_kind", "by_configuration", "paths", "known", "counted"):
            mine: dict[str, int] = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + count
        for key, counts in other.histograms.items():
            self.count_elements(key, counts)
        for key, z in other.worst_z.items():
            if z > self.worst_z.get(key, -1.0):
                self.worst_z[key], self.worst_case[key] = z, other.worst_case[key]


@dataclasses.dataclass(frozen=True)
class Trying:
    """The case that is about to run: all that is left of it if the process dies."""

    case: str
    ends: tuple[int, ...] = ()
    """Of a batch: one past the last document of each of its calls."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """So much has been done."""

    tally: Tally


@dataclasses.dataclass(frozen=True)
class Covered:
    """What was reached since the last time."""

    reached: Reached


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A finding as it was drawn, which is about to be shrunk: what is left of it if that is never finished."""

    finding: Finding


@dataclasses.dataclass(frozen=True)
class Found:
    """A shrunk finding."""

    finding: Finding


@dataclasses.dataclass(frozen=True)
class Finished:
    """The assignment is done."""

    tally: Tally


@dataclasses.dataclass(frozen=True)
class Died:
    """The case announced last took the device's context with it; the process ends here."""

    message: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The worker cannot do what was asked; one sentence."""

    reason: str


Message = Trying | Progress | Covered | Candidate | Found | Finished | Died | Failed
