"""What a campaign writes down as it goes: gathered in memory, and written every other second in one transaction."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.campaign.plan import kind_of
from attn_fuzz.coverage.counts import Pair, Reached
from attn_fuzz.findings.finding import Finding
from attn_fuzz.nights.database import Database
from attn_fuzz.nights.totals import pairs_of

WRITE_SECONDS: Final = 2.0
"""Between transactions: what a kill of everything at once may cost of the counts. Findings do not wait."""


@dataclasses.dataclass
class Slice:
    """One worker's work of some seconds."""

    job: Assignment
    begin: float = dataclasses.field(default_factory=time.time)
    """Seconds since 1970."""
    tally: Tally = dataclasses.field(default_factory=Tally)
    """What came of it until now."""
    findings: int = 0
    fresh: int = 0
    """Pairs of values that its backend had never reached."""
    row: int | None = None
    """Its number in the database, once it has one."""
    written: Tally = dataclasses.field(default_factory=Tally)
    """What of the tally has been added to counts of its target."""
    dirty: bool = True
    silence: float = 0.0
    """Seconds in which its workers were silent for long, because they hung, and until they were ended."""

    @property
    def seconds(self) -> float:
        """That it took, with what was compiled first and with silences."""
        return self.tally.seconds + self.tally.warm_up_seconds + self.silence

    @property
    def level(self) -> str:
        """The level, or both with a plus between them."""
        return "+".join(self.job.levels)

    @property
    def worst_z(self) -> float:
        """The largest error of its clean cases, in standard deviations; 0 where there is none."""
        return max(self.tally.worst_z.values(), default=0.0)

    @property
    def subject(self) -> tuple[str, str]:
        """(backend, ``cpu`` or ``cuda``)."""
        return self.job.backend, kind_of(self.job.device)


class Record:
    """What one campaign writes.

    Args:
        database: where.
        seed: of the campaign.
        planned: its seconds, where it has an end.
        environment: versions and device.

    Raises:
        DatabaseError: when its first row cannot be written.
    """

    def __init__(self, database: Database, seed: int, planned: float | None, environment: Mapping[str, str]) -> None:
        from attn_fuzz import __version__

        self.database = database
        values = (seed, time.time(), planned, __version__, json.dumps(dict(environment)))
        with database.writing() as connection:
            self.campaign = connection.execute(
                "INSERT INTO campaigns (seed, begin, planned, version, environment) VALUES (?, ?, ?, ?, ?)", values
            ).lastrowid
        self._slices: list[Slice] = []
        self._reached: dict[tuple[str, str], Reached] = {}
        self._found: list[tuple[Finding, Slice | None, float]] = []
        self._pairs: dict[tuple[str, str], Counter[Pair]] = {}
        self._written_at = time.monotonic()
        self._ids: dict[tuple[Any, ...], int] = {}

    # What is gathered.

    def begin(self, job: Assignment) -> Slice:
        """A slice that starts now."""
        self._slices.append(Slice(job))
        return self._slices[-1]

    def progress(self, piece: Slice, tally: Tally) -> None:
        """What came of a slice until now."""
        piece.tally, piece.dirty = tally, True

    def reach(self, piece: Slice, reached: Reached) -> None:
        """What a slice has reached since the last time."""
        known = self.pairs(piece.subject)
        piece.fresh += len(reached.pairs.keys() - known.keys())
        piece.dirty = True
        known.update(reached.pairs)
        self._reached.setdefault(piece.subject, Reached()).add(reached)

    def find(self, finding: Finding, piece: Slice | None) -> None:
        """A finding, of a slice or of what an earlier campaign left behind."""
        self._found.append((finding, piece, time.time()))
        if piece is not None:
            piece.findings, piece.dirty = piece.findings + 1, True

    def pairs(self, subject: tuple[str, str]) -> Counter[Pair]:
        """Cases of a backend on a kind of device by pair of values, of this campaign and of earlier ones."""
        if subject not in self._pairs:
            self._pairs[subject] = pairs_of(self.database, *subject)
        return self._pairs[subject]

    # How it is written.

    def write(self, *, now: bool = False) -> None:
        """Writes what was gathered, if it is time to; nothing is forgotten before it is written.

        Raises:
            DatabaseError: when it cannot be.
        """
        if not now and time.monotonic() - self._written_at < WRITE_SECONDS:
            return
        self._written_at = time.monotonic()
        pieces = [piece for piece in self._slices if piece.dirty]
        rows: dict[int, int] = {}
        before, self._ids = self._ids, dict(self._ids)
        try:
            with self.database.writing() as connection:
                for piece in pieces:
                    rows[id(piece)] = self._write_slice(connection, piece)
                for subject, reached in self._reached.items():
                    self._write_reached(connection, subject, reached)
                for found in self._found:
                    self._write_found(connection, *found)
        except BaseException:
            self._ids = before
            raise
        for piece in pieces:
            piece.row, piece.written, piece.dirty = rows[id(piece)], dataclasses.replace(piece.tally), False
        self._reached.clear()
        self._found.clear()

    def forget(self, pieces: list[Slice]) -> None:
        """Lets go of slices that have ended, once all of them is written."""
        ended = {id(piece) for piece in pieces if not piece.dirty}
        self._slices = [piece for piece in self._slices if id(piece) not in ended]

    def end(self) -> None:
        """Writes everything, and that the campaign has ended.

        Raises:
            DatabaseError: when it cannot be written.
        """
        self.write(now=True)
        with self.database.writing() as connection:
            connection.execute("UPDATE campaigns SET ended = ? WHERE id = ?", (time.time(), self.campaign))

    def _id(self, connection: sqlite3.Connection, table: str, **values: Any) -> int:
        """The number of a row with these values, which is made where it is missing."""
        key = (table, *values.values())
        if key not in self._ids:
            names, marks = ", ".join(values), ", ".join("?" * len(values))
            connection.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})", tuple(values.values()))
            where = " AND ".join(f"{name} = ?" for name in values)
            found = connection.execute(f"SELECT id FROM {table} WHERE {where}", tuple(values.values())).fetchone()
            self._ids[key] = int(found[0])
        return self._ids[key]

    def _subject(self, connection: sqlite3.Connection, subject: tuple[str, str]) -> int:
        return self._id(connection, "subjects", backend=subject[0], kind=subject[1])

    def _target(self, connection: sqlite3.Connection, piece: Slice) -> int:
        subject, job = self._subject(connection, piece.subject), piece.job
        return self._id(connection, "targets", subject=subject, device=job.device, level=piece.level, mode=job.mode)

    def _write_slice(self, connection: sqlite3.Connection, piece: Slice) -> int:
        """A slice's row, as it is now, and what its target's counts have to be raised by."""
        job, tally, target = piece.job, piece.tally, self._target(connection, piece)
        values = {
            "campaign": self.campaign,
            "target": target,
            "seed": job.seed,
            "aim": json.dumps({name: list(wanted) for name, wanted in job.aim.items()}),
            "begin": piece.begin,
            "seconds": piece.seconds,
            **{name: getattr(tally, name) for name in ("cases", "documents", "straddling", "refused", "repeated")},
            "known": sum(tally.known.values()),
            "findings": piece.findings,
            "worst_z": piece.worst_z,
            "fresh": piece.fresh,
        }
        self._write_counts(connection, target, piece)
        if piece.row is None:
            names, marks = ", ".join(values), ", ".join("?" * len(values))
            row = connection.execute(f"INSERT INTO slices ({names}) VALUES ({marks})", tuple(values.values())).lastrowid
            assert row is not None
            return row
        changes = ", ".join(f"{name} = ?" for name in values)
        connection.execute(f"UPDATE slices SET {changes} WHERE id = ?", (*values.values(), piece.row))
        return piece.row

    def _write_counts(self, connection: sqlite3.Connection, target: int, piece: Slice) -> None:
        """What a slice's tally has more than was written of it."""
        now, before = piece.tally, piece.written
        for what, mine, old in (
            ("kind", now.by_kind, before.by_kind),
            ("path", now.paths, before.paths),
            ("known", now.known, before.known),
            ("counted", now.counted, before.counted),
        ):
            more = Counter(mine) - Counter(old)
            connection.executemany(
                "INSERT INTO counts VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET cases = cases + excluded.cases",
                [(target, what, name, count) for name, count in more.items()],
            )
        connection.executemany(
            "INSERT INTO worst VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET z = excluded.z, "
            "case_json = excluded.case_json WHERE excluded.z > z",
            [(target, name, z, now.worst_case[name]) for name, z in now.worst_z.items()],
        )
        elements = {
            (name, place): count - (before.histograms[name][place] if name in before.histograms else 0)
            for name, counts in now.histograms.items()
            for place, count in enumerate(counts)
        }
        connection.executemany(
            "INSERT INTO histograms VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET elements = elements + excluded.elements",
            [(target, name, place, count) for (name, place), count in elements.items() if count],
        )

    def _write_reached(self, connection: sqlite3.Connection, subject: tuple[str, str], reached: Reached) -> None:
        number = self._subject(connection, subject)

        def value(pair: tuple[str, str]) -> int:
            return self._id(connection, "axis_values", axis=pair[0], value=pair[1])

        connection.executemany(
            "INSERT INTO pairs VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET cases = cases + excluded.cases",
            [(number, value(one), value(other), count) for (one, other), count in reached.pairs.items()],
        )
        connection.executemany(
            "INSERT INTO lengths VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET documents = documents + excluded.documents",
            [(number, queries, keys, count) for (queries, keys), count in reached.lengths.items()],
        )
        connection.executemany(
            "INSERT INTO refusals VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET draws = draws + excluded.draws",
            [(number, reason, count) for reason, count in reached.refused.items()],
        )

    def _write_found(self, connection: sqlite3.Connection, finding: Finding, piece: Slice | None, at: float) -> None:
        target = None if piece is None else self._target(connection, piece)
        connection.execute(
            "INSERT INTO found VALUES (?, ?, ?, ?, ?, 1) ON CONFLICT DO UPDATE SET times = times + 1",
            (self.campaign, target, finding.id, finding.symptom, at),
        )
