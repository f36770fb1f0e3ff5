"""What a campaign on another machine hands over: all that it has counted since the last time, by target.

Counts are kept per target, and told per backend and kind of device: so what is not of one target alone (pairs of
values, lengths, refusals, kinds, paths, known issues, errors) goes with the first of its backend's pieces.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.coverage.counts import Pair, Reached
from attn_fuzz.nights import totals
from attn_fuzz.nights.database import Database
from attn_fuzz.nights.record import Record, Slice, kind_of
from attn_fuzz.nights.totals import Verdicts
from attn_fuzz.oracle.checks.budget import HISTOGRAM_BINS

Subject = tuple[str, str]
"""A backend, and ``cpu`` or ``cuda``."""

_SUMS = ("cases", "documents", "straddling", "refused", "repeated", "seconds")


class Piece(NamedTuple):
    """What was done on one target."""

    backend: str
    device: str
    level: str
    """Or both with a plus between them."""
    mode: str
    tally: Tally
    reached: Reached


@dataclasses.dataclass(frozen=True)
class Handed:
    """One hand-over."""

    pieces: Sequence[Piece]
    findings: Sequence[Mapping[str, Any]]
    """As JSON has them; new ones, or such as have changed."""
    running: bool
    """Whether the campaign there goes on."""
    status: int | None = None
    """Of a campaign that has ended."""
    said: str = ""
    """Its last words on standard error."""


@dataclasses.dataclass(frozen=True)
class Totals:
    """All that a database has counted."""

    verdicts: Mapping[tuple[str, str, str, str], Verdicts]
    pairs: Mapping[Subject, Counter[Pair]]
    lengths: Mapping[Subject, Counter[tuple[int, int]]]
    refused: Mapping[Subject, Counter[str]]
    counts: Mapping[str, Mapping[tuple[str, str, str], int]]
    histograms: Mapping[tuple[str, str, str], Sequence[int]]
    largest: Mapping[tuple[str, str, str], tuple[float, str]]


def read(database: Database) -> Totals:
    """What a database holds.

    Raises:
        DatabaseError: when it cannot be read.
    """
    subjects = totals.subjects(database)
    return Totals(
        {row[:4]: row for row in totals.verdicts(database)},
        {subject: totals.pairs_of(database, *subject) for subject in subjects},
        {subject: Counter(totals.lengths_of(database, *subject)) for subject in subjects},
        {subject: totals.refusals_of(database, *subject) for subject in subjects},
        {what: totals.counted(database, what) for what in ("kind", "path", "known")},
        totals.histograms(database),
        totals.largest(database),
    )


def since(now: Totals, before: Totals) -> list[Piece]:
    """What was counted between two readings of one database."""
    pieces: list[Piece] = []
    told: set[Subject] = set()
    for key, row in now.verdicts.items():
        old = before.verdicts.get(key)
        more = {name: getattr(row, name) - (getattr(old, name) if old else 0) for name in _SUMS}
        subject = row.backend, kind_of(row.device)
        tally, reached = Tally(**more), Reached()
        if subject not in told:
            reached = _reached(now, before, subject)
            _note_subject(tally, now, before, subject)
        if any(more.values()) or reached or tally.by_kind:
            told.add(subject)
            pieces.append(Piece(row.backend, row.device, row.level, row.mode, tally, reached))
    return pieces


def _reached(now: Totals, before: Totals, subject: Subject) -> Reached:
    def more(of_now: Mapping[Subject, Counter[Any]], of_before: Mapping[Subject, Counter[Any]]) -> Counter[Any]:
        return of_now.get(subject, Counter()) - of_before.get(subject, Counter())

    return Reached(more(now.pairs, before.pairs), more(now.lengths, before.lengths), more(now.refused, before.refused))


def _note_subject(tally: Tally, now: Totals, before: Totals, subject: Subject) -> None:
    """Adds to a tally what is counted by backend and kind of device."""
    for what, mine in (("kind", tally.by_kind), ("path", tally.paths), ("known", tally.known)):
        for key, count in now.counts[what].items():
            more = count - before.counts[what].get(key, 0)
            if key[:2] == subject and more:
                mine[key[2]] = more
    for key, counts in now.histograms.items():
        old = before.histograms.get(key, ())
        if key[:2] == subject and list(counts) != list(old):
            # A database has no bin behind the last that is not empty; a tally has all of them.
            one, other = ([*each, *[0] * (HISTOGRAM_BINS - len(each))] for each in (counts, old))
            tally.histograms[key[2]] = [a - b for a, b in zip(one, other, strict=True)]
    for key, (z, case) in now.largest.items():
        if key[:2] == subject and z > before.largest.get(key, (-1.0, ""))[0]:
            tally.worst_z[key[2]], tally.worst_case[key[2]] = z, case


def noted(record: Record, piece: Piece) -> Slice:
    """A piece, gathered to be written."""
    levels = tuple(piece.level.split("+"))
    job = Assignment(backend=piece.backend, device=piece.device, seed=0, levels=levels, mode=piece.mode)
    piece_of = record.begin(job)
    piece_of.begin -= piece.tally.seconds
    record.progress(piece_of, piece.tally)
    record.reach(piece_of, piece.reached)
    return piece_of
