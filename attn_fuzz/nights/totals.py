"""What a campaign database holds, added up: for schedules, for ``coverage``, and for reports."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from attn_fuzz.coverage.axes import PLACES
from attn_fuzz.coverage.counts import Pair
from attn_fuzz.nights.database import Database


class Verdicts(NamedTuple):
    """What one target, that is a backend on a device at a level in a mode, was given so far, in all campaigns."""

    backend: str
    device: str
    level: str
    mode: str
    cases: int
    documents: int
    refused: int
    known: int
    findings: int
    seconds: float
    worst_z: float
    """The largest error of clean cases, in standard deviations."""
    slices: int
    straddling: int
    repeated: int


class Campaign(NamedTuple):
    """One start of ``attn-fuzz campaign``."""

    number: int
    seed: int
    begin: float
    """Seconds since 1970, as is ``ended``."""
    ended: float | None
    """None where it was killed, or still runs."""
    cases: int


class Piece(NamedTuple):
    """One worker's work of some seconds: over time, throughput."""

    begin: float
    """Seconds since 1970."""
    seconds: float
    backend: str
    device: str
    mode: str
    cases: int
    documents: int


def verdicts(database: Database) -> list[Verdicts]:
    """Those of every target."""
    rows = database.rows(
        "SELECT backend, device, level, mode, SUM(cases), SUM(documents), SUM(refused), SUM(known), SUM(findings), "
        "SUM(seconds), MAX(worst_z), COUNT(*), SUM(straddling), SUM(repeated) FROM slices "
        "JOIN targets ON targets.id = slices.target JOIN subjects ON subjects.id = targets.subject "
        "GROUP BY targets.id ORDER BY backend, device, level, mode"
    )
    return [Verdicts(*row) for row in rows]


def campaigns(database: Database) -> list[Campaign]:
    """All of them, the first first."""
    rows = database.rows(
        "SELECT campaigns.id, campaigns.seed, campaigns.begin, ended, COALESCE(SUM(cases), 0) FROM campaigns "
        "LEFT JOIN slices ON slices.campaign = campaigns.id GROUP BY campaigns.id ORDER BY campaigns.id"
    )
    return [Campaign(*row) for row in rows]


def environments(database: Database) -> list[str]:
    """Device, versions and commit of each campaign, as JSON."""
    return [text for (text,) in database.rows("SELECT environment FROM campaigns ORDER BY id")]


def subjects(database: Database) -> list[tuple[str, str]]:
    """(backend, ``cpu`` or ``cuda``) of all that was tested."""
    return [(backend, kind) for backend, kind in database.rows("SELECT backend, kind FROM subjects ORDER BY 1, 2")]


def pairs_of(database: Database, backend: str, kind: str) -> Counter[Pair]:
    """Cases by pair of values, and by value where both are one; of axes and values that this version has."""
    rows = database.rows(
        "SELECT one.axis, one.value, other.axis, other.value, cases FROM pairs "
        "JOIN subjects ON subjects.id = pairs.subject JOIN axis_values AS one ON one.id = a "
        "JOIN axis_values AS other ON other.id = b WHERE backend = ? AND kind = ?",
        (backend, kind),
    )
    return Counter(
        {
            ((axis, value), (other_axis, other)): cases
            for axis, value, other_axis, other, cases in rows
            if (axis, value) in PLACES and (other_axis, other) in PLACES
        }
    )


def lengths_of(database: Database, backend: str, kind: str) -> dict[tuple[int, int], int]:
    """Documents by where the octaves (``coverage.axes.OCTAVES``) of their queries and keys begin."""
    rows = database.rows(
        "SELECT queries, keys, documents FROM lengths JOIN subjects ON subjects.id = lengths.subject "
        "WHERE backend = ? AND kind = ?",
        (backend, kind),
    )
    return {(queries, keys): documents for queries, keys, documents in rows}


def refusals_of(database: Database, backend: str, kind: str) -> Counter[str]:
    """Draws that a backend did not take, by why."""
    rows = database.rows(
        "SELECT reason, draws FROM refusals JOIN subjects ON subjects.id = refusals.subject "
        "WHERE backend = ? AND kind = ?",
        (backend, kind),
    )
    return Counter(dict(rows))


def histograms(database: Database) -> dict[tuple[str, str, str], list[int]]:
    """Elements of clean kernel cases by z (``oracle.checks.budget``), by backend, device kind, and dtype and tensor."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for backend, kind, name, place, elements in database.rows(
        "SELECT backend, kind, name, bin, SUM(elements) FROM histograms JOIN targets ON targets.id = target "
        "JOIN subjects ON subjects.id = targets.subject GROUP BY subjects.id, name, bin"
    ):
        counts = found.setdefault((backend, kind, name), [])
        counts += [0] * (place + 1 - len(counts))
        counts[place] = elements
    return found


def throughput(database: Database, campaign: int | None = None) -> list[Piece]:
    """All slices in the order in which they began, of one campaign or of all."""
    rows = database.rows(
        "SELECT begin, seconds, backend, device, mode, cases, documents FROM slices "
        "JOIN targets ON targets.id = slices.target JOIN subjects ON subjects.id = targets.subject "
        "WHERE ? IS NULL OR campaign = ? ORDER BY begin",
        (campaign, campaign),
    )
    return [Piece(*row) for row in rows]


def largest(database: Database) -> dict[tuple[str, str, str], tuple[float, str]]:
    """The largest error of clean cases, and the case as JSON, by backend, device kind, and level, dtype and tensor."""
    rows = database.rows(
        "SELECT backend, kind, name, z, case_json FROM worst JOIN targets ON targets.id = target "
        "JOIN subjects ON subjects.id = targets.subject ORDER BY z"
    )
    return {(backend, kind, name): (z, case) for backend, kind, name, z, case in rows}


def counted(database: Database, what: str) -> dict[tuple[str, str, str], int]:
    """Cases by backend, device kind and name, of one kind of count: ``kind`` (level dtype), ``path`` or ``known``."""
    rows = database.rows(
        "SELECT backend, kind, name, SUM(cases) FROM counts JOIN targets ON targets.id = target "
        "JOIN subjects ON subjects.id = targets.subject WHERE what = ? GROUP BY subjects.id, name",
        (what,),
    )
    return {(backend, kind, name): cases for backend, kind, name, cases in rows}
