"""What campaigns have counted and measured, as a report takes it, wherever it is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from attn_fuzz.findings.finding import FindingError


@dataclasses.dataclass(frozen=True)
class Counted:
    """One backend."""

    backend: str
    cases: int
    documents: int
    refused: int
    known: int
    """Cases that known issues explain."""
    worst_z: float
    """The largest error of clean cases, in standard deviations."""
    where: str
    """In which level, dtype and tensor that was."""
    kinds: Mapping[str, int]
    """Cases by level and dtype."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One worker's work of some seconds."""

    begin: float
    """Seconds since the first piece began."""
    seconds: float
    backend: str
    cases: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of all campaigns that a report is about."""

    backends: tuple[Counted, ...] = ()
    histograms: Mapping[tuple[str, str], Sequence[int]] = dataclasses.field(default_factory=dict)
    """Elements of clean kernel cases by z (``oracle.checks.budget``), by backend, and dtype and tensor."""
    lengths: Mapping[str, Mapping[tuple[int, int], int]] = dataclasses.field(default_factory=dict)
    """Documents by where the octaves of their queries and keys begin, by backend."""
    pieces: tuple[Piece, ...] = ()
    seconds: float = 0.0
    environments: tuple[str, ...] = ()
    """Devices and versions, in words."""

    @property
    def cases(self) -> int:
        """All of them."""
        return sum(each.cases for each in self.backends)


def _worst(tally: Mapping[str, Any]) -> tuple[float, str]:
    found = [(float(z), where) for where, z in tally.get("worst_z", {}).items()]
    return max(found, default=(0.0, ""))


def _together(several: Sequence[Counted]) -> Counted:
    """One backend's counts of several campaigns."""
    worst = max(several, key=lambda each: each.worst_z)
    kinds: dict[str, int] = {}
    for each in several:
        for kind, cases in each.kinds.items():
            kinds[kind] = kinds.get(kind, 0) + cases
    return Counted(
        worst.backend,
        cases=sum(each.cases for each in several),
        documents=sum(each.documents for each in several),
        refused=sum(each.refused for each in several),
        known=sum(each.known for each in several),
        worst_z=worst.worst_z,
        where=worst.where,
        kinds=dict(sorted(kinds.items())),
    )


def _counted(name: str, tally: Mapping[str, Any]) -> Counted:
    worst_z, where = _worst(tally)
    return Counted(
        name,
        cases=int(tally["cases"]),
        documents=int(tally["documents"]),
        refused=int(tally["refused"]),
        known=sum(tally.get("known", {}).values()),
        worst_z=worst_z,
        where=where,
        kinds=tally.get("by_kind", {}),
    )


def versions_in_words(environment: Mapping[str, str]) -> str:
    """Device and versions that verdicts were made with."""
    return ", ".join(f"{key} {value}" for key, value in environment.items() if key not in ("commit", "hypothesis"))


def of_verdicts(verdicts: Sequence[Mapping[str, Any]]) -> Measured:
    """From what campaigns print with ``--json``; they do not say which lengths, or when.

    Args:
        verdicts: one of each campaign.

    Raises:
        FindingError: for anything else.
    """
    by_name: dict[str, list[Counted]] = {}
    histograms: dict[tuple[str, str], list[int]] = {}
    environments: dict[str, None] = {}
    try:
        for verdict in verdicts:
            for name, tally in verdict["backends"].items():
                by_name.setdefault(name, []).append(_counted(name, tally))
                for what, counts in tally.get("histograms", {}).items():
                    before = histograms.get((name, what), [0] * len(counts))
                    histograms[name, what] = [a + b for a, b in zip(before, counts, strict=True)]
            environments[versions_in_words(verdict.get("environment", {}))] = None
        seconds = sum(float(verdict["seconds"]) for verdict in verdicts)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FindingError(f"this is no verdict of a campaign: {type(error).__name__} {error}") from None
    counted = tuple(_together(several) for _, several in sorted(by_name.items()))
    return Measured(counted, histograms, seconds=seconds, environments=tuple(environments))
