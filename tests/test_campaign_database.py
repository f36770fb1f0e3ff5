"""What campaigns count is in one file: written by several at a time, brought up to date, and never lost."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.coverage.counts import Reached
from attn_fuzz.nights import schema, totals
from attn_fuzz.nights.database import DamagedDatabase, Database, DatabaseError, path_beside, set_aside
from attn_fuzz.nights.record import Record, Slice
from attn_fuzz.reports.from_nights import of_database
from attn_fuzz.reports.page import page

JOB = Assignment(backend="loop", device="cpu", seed=5, levels=("kernel",), mode="batch")
DTYPE, MASK = ("dtype", "bf16"), ("mask", "causal")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return path_beside(tmp_path / "findings")


def record(database: Database) -> Record:
    return Record(database, 7, None, {"torch": "2.13.0"})


def tally(cases: int, z: float = 2.0) -> Tally:
    return Tally(
        cases=cases,
        documents=3 * cases,
        seconds=1.5,
        by_kind={"batch bf16": cases},
        paths={"loop": cases},
        known={"some-issue": 1},
        histograms={"bf16 out": [cases, 1]},
        worst_z={"batch bf16 out": z},
        worst_case={"batch bf16 out": f"case of {z}"},
    )


def reached(times: int = 1) -> Reached:
    return Reached(
        Counter({(DTYPE, DTYPE): times, (DTYPE, MASK): times}), Counter({(2, 4): times}), Counter({"softcap": times})
    )


def work(database: Database, *counts: int) -> Slice:
    """A slice that tells its tally so many times, each as it is then."""
    written = record(database)
    piece = written.begin(JOB)
    for cases in counts:
        written.progress(piece, tally(cases))
        written.reach(piece, reached())
        written.write(now=True)
    written.end()
    return piece


def test_what_is_counted_is_there_for_the_next_campaign(path: Path) -> None:
    with Database(path) as database:
        work(database, 2, 5)
    with Database(path) as database:
        work(database, 10)
        (found,) = totals.verdicts(database)
        # A tally grows: 5, not 2 + 5; and that of the second campaign comes to it.
        assert found[:6] == ("loop", "cpu", "kernel", "batch", 15, 45)
        assert totals.pairs_of(database, "loop", "cpu") == {(DTYPE, DTYPE): 3, (DTYPE, MASK): 3}
        assert totals.lengths_of(database, "loop", "cpu") == {(2, 4): 3}
        assert totals.refusals_of(database, "loop", "cpu") == {"softcap": 3}
        assert totals.histograms(database) == {("loop", "cpu", "bf16 out"): [15, 2]}
        assert totals.counted(database, "kind") == {("loop", "cpu", "batch bf16"): 15}
        assert totals.counted(database, "path") == {("loop", "cpu", "loop"): 15}
        assert totals.counted(database, "known") == {("loop", "cpu", "some-issue"): 2}
        assert totals.subjects(database) == [("loop", "cpu")]
        assert [campaign.cases for campaign in totals.campaigns(database)] == [5, 10]
        assert all(campaign.ended is not None for campaign in totals.campaigns(database))
        assert [piece.cases for piece in totals.throughput(database)] == [5, 10]
        assert [piece.cases for piece in totals.throughput(database, 2)] == [10]


def test_the_largest_error_is_kept_with_its_case(path: Path) -> None:
    with Database(path) as database:
        written = record(database)
        for z in (3.0, 8.0, 5.0):
            written.progress(written.begin(JOB), tally(1, z))
            written.write(now=True)
        assert totals.largest(database) == {("loop", "cpu", "batch bf16 out"): (8.0, "case of 8.0")}


def test_what_is_fresh_was_never_reached_before(path: Path) -> None:
    with Database(path) as database:
        first = work(database, 1)
        second = work(database, 1)
    assert (first.fresh, second.fresh) == (2, 0)


# Versions.


def test_an_older_database_is_made_newer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Database(path) as database:
        work(database, 4)
    step = "ALTER TABLE slices ADD COLUMN weather TEXT NOT NULL DEFAULT 'fair'"
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, step))
    with Database(path) as database:
        assert database.rows("SELECT cases, weather FROM slices") == [(4, "fair")]
        assert database.rows("PRAGMA user_version") == [(2,)]


def test_a_step_that_fails_leaves_the_older_one_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Database(path) as database:
        work(database, 4)
    with monkeypatch.context() as patched:
        patched.setattr(schema, "STEPS", (*schema.STEPS, "DROP TABLE slices; DROP TABLE weather"))
        with pytest.raises(DatabaseError):
            Database(path)
    with Database(path) as database:
        assert totals.verdicts(database)[0].cases == 4


def test_a_newer_database_says_so_and_stays(path: Path) -> None:
    with Database(path) as database:
        work(database, 4)
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=r"was written by a newer version \(schema 99, this one has \d+\)"):
        Database(path)
    assert path.read_bytes() == before


def test_the_database_of_something_else_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(DatabaseError, match="is no campaign database"):
        Database(path)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (1,)


# Damage.


def no_database(data: bytes) -> bytes:
    return b"no database at all, but long enough to be looked at" * 20


def overwritten(data: bytes) -> bytes:
    return data[:4096] + bytes(len(data) - 4096)


def shortened(data: bytes) -> bytes:
    return data[: len(data) // 2 + 100]


def scrambled(data: bytes) -> bytes:
    return data[:100] + bytes(byte ^ 0x5A for byte in data[100:])


@pytest.mark.parametrize("damage", [no_database, overwritten, shortened, scrambled])
def test_a_damaged_database_is_one_sentence_and_is_kept(path: Path, damage: Any) -> None:
    with Database(path) as database:
        work(database, *range(1, 40))
    # What is still in the log comes into the file when the last one closes it.
    path.write_bytes(damage(path.read_bytes()))
    broken = path.read_bytes()
    with pytest.raises(
        DamagedDatabase, match="is damaged; restore it from a copy, or start a new one with --set-aside"
    ):
        Database(path)
    assert path.read_bytes() == broken
    kept = set_aside(path)
    assert kept is not None
    assert (kept.name, kept.read_bytes()) == ("findings.sqlite.damaged-1", broken)
    with Database(path) as database:
        assert totals.verdicts(database) == []
    path.write_bytes(broken)
    again = set_aside(path)
    assert again is not None
    assert again.name == "findings.sqlite.damaged-2"


def test_a_file_where_no_file_can_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "findings.sqlite").mkdir()
    with pytest.raises(DatabaseError, match="cannot be used"):
        Database(tmp_path / "findings.sqlite")
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match="cannot be used"):
        Database(tmp_path / "file" / "findings.sqlite")
    with pytest.raises(DatabaseError, match="there is no campaign database"):
        Database(tmp_path / "nothing.sqlite", create=False)


def test_what_a_full_disk_refuses_is_written_once_there_is_room(path: Path) -> None:
    with Database(path) as database:
        written = record(database)
        piece = written.begin(JOB)
        (pages,) = database.rows("PRAGMA page_count")[0]
        database.rows(f"PRAGMA max_page_count = {pages}")
        written.progress(piece, tally(3))
        many = {(("dtype", f"fp{number}"), MASK): 1 for number in range(2000)}
        written.reach(piece, Reached(Counter(many)))
        with pytest.raises(DatabaseError, match=r"the disk is full: .* could not be written"):
            written.write(now=True)
        assert totals.verdicts(database) == []
        written.progress(piece, tally(4))
        database.rows("PRAGMA max_page_count = 100000")
        written.write(now=True)
        assert totals.verdicts(database)[0].cases == 4
        assert database.rows("SELECT COUNT(*), SUM(cases) FROM pairs") == [(2000, 2000)]


def test_several_write_at_a_time(path: Path) -> None:
    def write() -> None:
        with Database(path) as database:
            for cases in range(1, 6):
                work(database, cases)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    with Database(path) as database:
        assert database.rows("PRAGMA integrity_check") == [("ok",)]
        assert totals.verdicts(database)[0].cases == 4 * 15
        assert totals.pairs_of(database, "loop", "cpu")[DTYPE, MASK] == 4 * 5


def test_a_report_takes_what_was_counted(path: Path) -> None:
    with Database(path) as database:
        work(database, 5, 9)
        work(database, 4)
        found = of_database(database)
    (counted,) = found.backends
    assert (counted.backend, counted.cases, counted.documents) == (JOB.backend, 13, 39)
    assert (counted.worst_z, counted.where, counted.kinds) == (2.0, "batch bf16 out", {"batch bf16": 13})
    assert found.histograms == {(JOB.backend, "bf16 out"): [13, 2]}
    assert found.lengths == {JOB.backend: {(2, 4): 3}}
    assert [piece.cases for piece in found.pieces] == [9, 4]
    assert found.pieces[0].begin == 0.0
    assert found.environments == ("torch 2.13.0",)
    assert "torch 2.13.0" in page("title", "made", [], [], found)
