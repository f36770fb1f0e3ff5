"""Campaigns go on where the last one was, whatever ended it, and lose nothing that was found."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commandline import FOUND as STORED
from commandline import SWAPPED, Run, sentence
from in_turn import InTurn

from attn_fuzz.backends import registry
from attn_fuzz.campaign import new_process, notes
from attn_fuzz.campaign.inquest import Suspect
from attn_fuzz.campaign.isolated import NoDevice
from attn_fuzz.campaign.messages import Assignment, Candidate, Failed, Finished, Found, Message, Tally, Trying
from attn_fuzz.cli import night, night_screen
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.execution.process import NOT_OURS
from attn_fuzz.findings.ledger import Ledger
from attn_fuzz.findings.store import Store
from attn_fuzz.nights import supervisor
from attn_fuzz.nights.database import DatabaseError
from attn_fuzz.nights.kept import LOOK_AGAIN, OFTEN, Kept
from attn_fuzz.nights.leftovers import NotesFolder, recover
from attn_fuzz.nights.pool import Listener, RoundPool
from attn_fuzz.nights.record import Record, Slice
from attn_fuzz.nights.schedule import Standing, Target
from attn_fuzz.nights.spaces import targets
from attn_fuzz.nights.view import View
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference.case import Case

SCHEMA = json.loads((Path(night.__file__).parent.parent / "verdict.schema.json").read_text())
FOUND = dataclasses.replace(STORED, symptoms=({"symptom": STORED.symptom, "tensor": "dk"},))
LARGER = dataclasses.replace(FOUND, case=FOUND.case.replace(lengths=(5,)))
OTHER = dataclasses.replace(FOUND, symptom="WrongOutput")
CRASH = dataclasses.replace(FOUND, symptom="Crashed", symptoms=({"symptom": "Crashed", "tensor": "process"},))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "findings")
    found.prepare()
    return found


# Notes of workers.


def test_what_a_worker_finds_is_written_before_it_is_told(tmp_path: Path) -> None:
    told: list[Message] = []

    def send(message: Message) -> None:
        # Whoever hears of it may be killed at once.
        told.append(message)
        seen.append(notes.read(tmp_path))

    seen: list[notes.Notes] = []
    job = Assignment(backend="loop", device="cpu", seed=0, notes=str(tmp_path / "3"))
    note = notes.noting(job, send)
    for message in (Trying("a case", (1, 2)), Candidate(LARGER), Trying("smaller"), Found(FOUND), Found(OTHER)):
        note(message)
    assert [len(each.running) for each in seen] == [1] * 5
    (running,) = seen[0].running
    assert running[:3] == ("loop", "cpu", Trying("a case", (1, 2)))
    assert [[each.id for each in read.candidates] for read in seen] == [[], [LARGER.id], [LARGER.id], [], []]
    assert {each.id for each in seen[-1].found} == {FOUND.id, OTHER.id}
    assert len(told) == 5


def test_a_full_disk_does_not_keep_a_worker_from_telling(tmp_path: Path) -> None:
    told: list[Message] = []
    note = notes.noting(Assignment(backend="loop", device="cpu", seed=0, notes=str(tmp_path / "no" / "3")), told.append)
    note(Found(FOUND))
    assert told == [Found(FOUND)]


def test_half_a_note_is_none(tmp_path: Path) -> None:
    (tmp_path / "1.running").write_text('{"backend": "lo')
    (tmp_path / "1.found-7-0").write_text("[]")
    assert notes.read(tmp_path) == ([], [], [])


def nobody(suspect: Suspect) -> None:
    pytest.fail("nothing was running")


def abandoned(beside: Path, *messages: Message) -> None:
    """Notes of a campaign that is no more."""
    folder = NotesFolder(beside)
    note = notes.noting(Assignment(backend="loop", device="cpu", seed=0, notes=folder.beginning(1)), lambda _: None)
    for message in messages:
        note(message)
    folder._lock.close()


def test_what_a_killed_campaign_had_found_is_kept(tmp_path: Path, store: Store) -> None:
    abandoned(tmp_path / "running", Found(FOUND), Candidate(LARGER))
    abandoned(tmp_path / "running", Candidate(OTHER))
    kept = Kept(store)
    assert recover(tmp_path / "running", kept.keep, kept.has_like, nobody) == 2
    # One with the same symptom is there, shrunk; of the other there is nothing better.
    assert set(store.identifiers()) == {FOUND.id, OTHER.id}
    assert list((tmp_path / "running").iterdir()) == []


def test_a_campaign_that_still_runs_is_left_alone(tmp_path: Path, store: Store) -> None:
    folder = NotesFolder(tmp_path / "running")
    Path(f"{folder.beginning(1)}.found-1-0").write_text(json.dumps(FOUND.to_dict()))
    assert recover(tmp_path / "running", lambda finding: None, lambda finding: False, nobody) == 0
    assert folder.path.is_dir()
    folder.close()
    assert recover(tmp_path / "running", lambda finding: None, lambda finding: False, nobody) == 0


def test_what_was_running_is_looked_into(tmp_path: Path, store: Store) -> None:
    abandoned(tmp_path / "running", Trying('{"level": "kernel", "lengths": [3]}'))
    abandoned(tmp_path / "running", Trying("no case"))
    asked: list[Suspect] = []
    assert recover(tmp_path / "running", lambda finding: None, lambda finding: False, asked.append) == 2
    assert [(each.finding.backend, each.finding.case.lengths, each.sure) for each in asked] == [("loop", (3,), False)]


# Findings.


def test_a_bug_is_stored_once_and_small(store: Store) -> None:
    kept = Kept(store)
    assert kept.keep(LARGER)
    assert not kept.keep(FOUND)
    assert not kept.keep(dataclasses.replace(LARGER, case=LARGER.case.replace(lengths=(9,))))
    assert set(store.identifiers()) == {LARGER.id, FOUND.id}
    assert store.load(FOUND.id).same_as == LARGER.id
    assert list(kept.findings) == [FOUND.id]


def test_a_bug_of_an_earlier_night_is_no_new_one(store: Store) -> None:
    Kept(store).keep(FOUND)
    tonight = Kept(store)
    assert not tonight.keep(FOUND)
    assert not tonight.keep(LARGER)
    assert list(tonight.findings) == [FOUND.id]
    other = dataclasses.replace(FOUND, backend="backup", symptom="Crashed")
    assert tonight.keep(other)
    assert tonight.new([FOUND, other]) == [other]
    ledger = Ledger(store.folder).written()
    assert {entry.signature.backend for entry in ledger.values()} == {FOUND.backend, "backup"}


def test_what_was_found_often_is_shrunk_now_and_then_only(store: Store) -> None:
    kept = Kept(store)
    for _ in range(OFTEN):
        assert kept.often(FOUND.backend, "kernel", 1) == ()
        kept.keep(FOUND)
    assert kept.often(FOUND.backend, "kernel", 1) == (FOUND.symptom,)
    assert kept.often(FOUND.backend, "layer", 1) == ()
    assert kept.often(FOUND.backend, "kernel", LOOK_AGAIN) == ()


def test_crashes_that_are_known_are_not_looked_into_again(store: Store) -> None:
    kept = Kept(store)
    kept.keep(dataclasses.replace(CRASH, case=LARGER.case))
    kept.keep(CRASH)
    kept.keep(FOUND)
    assert kept.fatal() == [CRASH]
    assert [each.id for each in Kept(store).fatal()] == [CRASH.id]


# A round.


class Scripted(RoundPool):
    """Slices whose workers say what is written, in this process."""

    script: tuple[Message, ...] = ()

    def _step(self) -> None:
        from attn_fuzz.campaign.pool import Worker

        assignment, restarts = self._waiting.popleft()
        worker = Worker(assignment, None, None, None, restarts, 0)  # type: ignore[arg-type]
        for message in self.script:
            self._take(worker, message)
        self._done.append(worker)
        self._listener.step([self._slice(worker.assignment)])


def test_a_slice_that_cannot_run_ends_no_round() -> None:
    told: dict[str, list[Any]] = {"failed": [], "progress": [], "steps": []}
    listener = Listener(
        lambda piece, tally: told["progress"].append(tally.cases),
        lambda piece, reached: None,
        lambda finding, piece: None,
        lambda piece, reason: told["failed"].append(reason),
        lambda alive: told["steps"].append(len(alive)),
        no_more,
        lambda suspect: None,
    )
    slices = [Slice(Assignment(backend="loop", device="cpu", seed=0, notes=str(number))) for number in range(2)]
    pool = Scripted(slices, 1, listener, 9.0)
    pool.script = (Failed("loop refused all 500 cases"), Finished(Tally(cases=0)))
    pool.run()
    assert told["failed"] == ["loop refused all 500 cases"] * 2
    assert told["steps"] == [1, 1]


def test_nobody_waits_for_a_slice_that_is_late() -> None:
    from attn_fuzz.campaign.pool import Worker

    jobs = (Assignment(backend="loop", device="cpu", seed=0, seconds=5.0, notes=str(number)) for number in range(99))
    listener = Listener(*(lambda *_: None,) * 5, lambda left: Slice(next(jobs)), lambda suspect: None)
    pool = RoundPool([Slice(next(jobs))], 2, listener, 1000.0)
    job, _ = pool._waiting.popleft()
    now = time.monotonic()
    hangs = Worker(job, None, None, None, 0, 0, started=now)  # type: ignore[arg-type]
    pool._running.append(hangs)
    pool._refill()
    assert not pool._waiting
    hangs.started = now - 60.0
    pool._refill()
    pool._refill()
    # One place was idle.
    assert [job.notes for job, _ in pool._waiting] == ["1"]
    for _ in range(50):
        pool._waiting.clear()
        pool._refill()
    # A round has to come to its end, too.
    assert not pool._waiting


def test_nobody_waits_for_a_slice_that_is_long() -> None:
    """As those of backends that compile are; what comes meanwhile ends with it, and keeps no round going."""
    from attn_fuzz.campaign.pool import Worker

    def jobs(seconds: float) -> Iterator[Assignment]:
        for number in range(99):
            yield Assignment(backend="loop", device="cuda", seed=0, seconds=seconds, notes=f"{seconds} {number}")

    more = jobs(15.0)
    listener = Listener(*(lambda *_: None,) * 5, lambda left: Slice(next(more)), lambda suspect: None)
    pool = RoundPool([Slice(next(jobs(45.0)))], 2, listener, 1000.0)
    now = time.monotonic()
    long = Worker(pool._waiting.popleft()[0], None, None, None, 0, 0, started=now - 35.0)  # type: ignore[arg-type]
    pool._running.append(long)
    pool._refill()
    ((job, _),) = pool._waiting
    assert job.notes == "15.0 0"
    assert job.seconds == pytest.approx(10.0, abs=1.0)
    pool._waiting.clear()
    # With little of its time left there is nothing to begin.
    long.started = now - 41.0
    pool._refill()
    assert not pool._waiting
    # What is begun for one that was begun meanwhile ends no later.
    pool._running[:] = [Worker(job, None, None, None, 0, 0, started=now)]  # type: ignore[arg-type]
    pool._refill()
    ((job, _),) = pool._waiting
    assert job.seconds == pytest.approx(10.0, abs=1.0)


def test_a_round_goes_on_where_nothing_that_it_has_could_run() -> None:
    """What failed or is silent gets no further slice of the round, unless there is nothing else."""
    first, second = (Target(name, "cpu", "kernel", "batch") for name in ("loop", "backup"))
    standings = {first: Standing(), second: Standing()}

    def piece(notes: str, **changes: Any) -> Slice:
        return Slice(Assignment(backend="loop", device="cpu", seed=0, seconds=8.0, notes=notes), **changes)

    failed, running = piece("1"), piece("2", tally=Tally(cases=4, seconds=2.0))
    assert supervisor.planned_anew({first: Standing()}, [(first, failed)], {"1"}, 8.0).slices(1) == [first]
    plan = supervisor.planned_anew(standings, [(first, failed), (second, running)], {"1"}, 8.0)
    assert plan.slices(3) == [second] * 3
    silent = piece("3", silence=30.0)
    assert supervisor.planned_anew(standings, [(first, silent)], (), 8.0).slices(2) == [second] * 2
    # Nothing of it is kept: the round tells what came of it at its end.
    assert standings == {first: Standing(), second: Standing()}


class Ended:
    """Stands for the process of a worker that has ended."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode, self.pid = exitcode, None

    def kill(self) -> None:
        pass

    join = kill


class Deathbed(NamedTuple):
    """A round, and what it tells of a worker that dies in it."""

    pool: RoundPool
    piece: Slice
    suspects: list[Suspect]
    failed: list[str]

    def bury(self, exitcode: int | None, trying: Trying | None, silent: float = 0.0) -> None:
        """One worker dies of this, or hangs where there is no exit status."""
        from attn_fuzz.campaign.pool import Worker

        worker = Worker(self.piece.job, Ended(exitcode), None, None, 0, 0)  # type: ignore[arg-type]
        worker.trying, worker.heard = trying, worker.heard - silent
        self.pool._running.append(worker)
        self.pool._note_silence()
        how = "died" if exitcode is not None else "was silent"
        self.pool._bury(worker, "Crashed" if exitcode is not None else "Hung", how)


@pytest.fixture
def deathbed() -> Deathbed:
    suspects: list[Suspect] = []
    failed: list[str] = []
    told = (lambda *_: None,) * 3
    listener = Listener(*told, lambda _, why: failed.append(why), nothing_alive, no_more, suspects.append)
    piece = Slice(Assignment(backend="loop", device="cpu", seed=0, seconds=99.0, notes="7"))
    pool = RoundPool([piece], 1, listener, 1000.0)
    pool._waiting.clear()
    return Deathbed(pool, piece, suspects, failed)


def nothing_alive(alive: Any) -> None:
    pass


def no_more(left: float) -> Slice:
    pytest.fail("nothing is late")


TRYING = Trying('{"level": "kernel", "lengths": [3]}')


def test_deaths_are_looked_into_beside_the_round(deathbed: Deathbed) -> None:
    for exitcode in (-signal.SIGSEGV, -signal.SIGKILL, 255, NOT_OURS, None):
        deathbed.bury(exitcode, TRYING)
    assert [(each.finding.symptom, each.sure) for each in deathbed.suspects] == [
        ("Crashed", True),
        # The second is what multiprocessing gives where the process that forked it was killed.
        ("Crashed", False),
        ("Crashed", False),
        ("Crashed", False),
        ("Hung", True),
    ]
    assert "was killed from outside: no finding" in deathbed.suspects[1].how
    assert "an error that need not be its kernel's" in deathbed.suspects[3].how
    # Each has another worker in its place.
    assert len(deathbed.pool._waiting) == 5
    assert deathbed.failed == []


def test_what_is_known_is_not_looked_into_twice(deathbed: Deathbed) -> None:
    crash = dataclasses.replace(CRASH, backend="loop")
    deathbed.pool._findings["loop", "Crashed"] = crash
    deathbed.bury(-signal.SIGSEGV, TRYING)
    assert deathbed.suspects == []
    deathbed.bury(-signal.SIGKILL, TRYING)
    assert len(deathbed.suspects) == 1


def test_a_worker_that_is_killed_before_its_first_case_begins_again(deathbed: Deathbed) -> None:
    deathbed.bury(-signal.SIGKILL, None)
    assert (len(deathbed.pool._waiting), deathbed.failed) == (1, [])
    deathbed.bury(1, None)
    assert deathbed.failed == ["a worker for loop died before its first case"]
    assert deathbed.suspects == []


def test_silence_is_time_too_and_is_looked_into_early(deathbed: Deathbed) -> None:
    deathbed.bury(None, TRYING, silent=60.0)
    assert 60.0 <= deathbed.piece.seconds < 70.0
    # It may come back; so nothing is sure before it is ended.
    assert [each.sure for each in deathbed.suspects] == [False, True]
    assert deathbed.suspects[0].silence >= 60.0
    deathbed.bury(-signal.SIGKILL, None)
    assert deathbed.piece.seconds >= 60.0


# The command.


class RoundInTurn(RoundPool):
    """Slices in this process, one after another."""

    def _step(self) -> None:
        InTurn._step(self)
        self._listener.step([])


@pytest.fixture
def campaign(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, without a process for anything."""
    monkeypatch.setattr(supervisor, "RoundPool", RoundInTurn)
    # The first slice alone of each campaign.
    monkeypatch.setattr(supervisor, "SLICES_A_PLACE", 1)

    def run(*arguments: str) -> Any:
        return attn_fuzz(*arguments)

    return run


ARGUMENTS = ("--device", "cpu", "--level", "kernel", "--mode", "case", "--workers", "1", "--seconds", "1")


@pytest.mark.slow
def test_a_campaign_goes_on_where_the_last_one_was(campaign: Run) -> None:
    # Its second is one of cases: what a process imports for its first one takes as long.
    for case in drawn(registry.load("loop"), seed=0, count=1):
        examine(case, registry.load("loop"), "cpu")
    first = campaign("campaign", "-b", "loop", *ARGUMENTS, "--json")
    assert (first.status, first.json["verdict"]) == (0, "clean")
    second = campaign("campaign", "-b", "loop", *ARGUMENTS, "--json")
    # Other cases, and more is reached than before.
    assert second.json["coverage"]["loop"] > first.json["coverage"]["loop"] > 0
    covered = campaign("coverage", "--json")
    (backend,) = covered.json["backends"]
    assert (covered.status, backend["backend"], backend["device"]) == (0, "loop", "cpu")
    assert backend["values"]["mode case"] == first.json["cases"] + second.json["cases"]
    assert backend["values"]["level layer"] == 0
    assert "level layer" in backend["values_never"]
    shown = campaign("coverage", "-b", "loop")
    assert "never reached" in shown.out
    assert "level " in shown.out
    assert os.listdir(".attn-fuzz/findings.running") == []
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, of the extra dev")
    for done in (first, second):
        jsonschema.Draft202012Validator(SCHEMA).validate(done.json)


def test_wrong_campaigns_are_one_sentence(campaign: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown backend 'flesh'" in sentence(campaign("campaign", "-b", "flesh"))
    assert "flash cannot run on cpu here" in sentence(campaign("campaign", "-b", "flash", "--device", "cpu"))
    assert "unknown device 'tpu'" in sentence(campaign("campaign", "--device", "tpu"))
    assert "legacy:loop has no such level" in sentence(
        campaign("campaign", "-b", "legacy:loop", "--device", "cpu", "--level", "kernel")
    )
    assert "there is no campaign database" in sentence(campaign("coverage"))
    Path(".attn-fuzz").mkdir()
    Path(".attn-fuzz/findings.sqlite").write_text("no database" * 100)
    assert "is damaged; restore it from a copy" in sentence(campaign("campaign", "-b", "loop", "--device", "cpu"))
    assert "is damaged" in sentence(campaign("coverage"))
    monkeypatch.setattr(supervisor, "RoundPool", Scripted)
    monkeypatch.setattr(Scripted, "script", (Trying(STORED.case.to_json()), Found(FOUND), Finished(Tally(cases=4))))
    done = campaign("campaign", "-b", SWAPPED, *ARGUMENTS, "--set-aside")
    assert done.status == 1
    assert "the damaged database is kept as" in done.err
    assert Path(".attn-fuzz/findings.sqlite.damaged-1").read_text() == "no database" * 100
    assert "no campaign has tested loop" in sentence(campaign("coverage", "-b", "loop"))


class Gone:
    """Stands for a process that cannot use its device."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def symptom(self, case: Case) -> str | None:
        raise NoDevice("a new process cannot use it")

    def close(self) -> None:
        pass


def test_a_device_that_goes_away_ends_what_there_was_on_it(campaign: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RoundPool", Scripted)
    monkeypatch.setattr(Scripted, "script", (Failed("a worker for loop died before its first case"),))
    monkeypatch.setattr(supervisor, "Isolated", Gone)
    done = campaign("campaign", "-b", "loop", *ARGUMENTS)
    assert done.status == 2
    assert "attn-fuzz: cpu cannot be used any more, so the campaign went on without it" in done.err
    assert "a worker for loop died before its first case" in done.out


def test_a_disk_that_is_full_until_the_end_is_said(campaign: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Record, **_: object) -> None:
        raise DatabaseError("the disk is full: it could not be written; make room on it")

    monkeypatch.setattr(supervisor, "RoundPool", Scripted)
    monkeypatch.setattr(Scripted, "script", (Trying(STORED.case.to_json()), Found(FOUND), Finished(Tally(cases=4))))
    monkeypatch.setattr(Record, "write", full)
    done = campaign("campaign", "-b", SWAPPED, *ARGUMENTS, "--json")
    assert (done.status, done.json["cases"], done.json["verdict"]) == (2, 4, "trouble")
    assert "attn-fuzz: the disk is full" in done.err
    # Findings are files of their own.
    assert [finding["id"] for finding in done.json["findings"]] == [FOUND.id]
    assert Path(f".attn-fuzz/findings/{FOUND.id}.json").is_file()


def test_all_that_runs_here_is_a_target() -> None:
    found = targets(["loop", "flash", "sdpa_dense_math"], ["cpu"], ("kernel", "layer"), ("case", "batch", "packed"))
    assert {target.backend for target in found} == {"loop", "sdpa_dense_math"}
    assert len([target for target in found if target.backend == "loop"]) == 6
    assert not any(target.compiled for target in found if target.backend == "loop")


def test_the_screen_fits_into_eighty_columns() -> None:
    from io import StringIO

    from rich.console import Console

    view = View(ends=time.monotonic() + 3700.4, compiled=frozenset({"flex_compiled"}))
    view.done = {
        ("loop", "cpu"): Tally(
            cases=1234567, documents=98765432, known={"a": 3}, worst_z={"x": 6.04}, worst_case={"x": ""}
        ),
        ("flex_compiled", "cpu"): Tally(cases=7),
        ("sdpa_nested_efficient", "cuda"): Tally(cases=12345),
    }
    view.findings[("loop", "cpu")] = 2
    text = StringIO()
    console = Console(file=text, width=80, emoji=False)
    console.print(night_screen.NightScreen(lambda subject: 0.724, console).drawn(view))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "1:01:40 left" in lines[0]
    assert lines[2].split() == ["loop", "cpu", "1.2M", "98.8M", "2", "3", "6.0", "72%"]
    assert lines[3].split()[:3] == ["sdpa_nested_efficient", "cuda", "12.3k"]
    # What compiles stands by itself.
    assert lines[4].split()[:4] == ["flex_compiled", "cpu", "*", "7"]


# Kills.


def run_campaign(folder: str) -> None:
    """A campaign of a process of its own."""
    from attn_fuzz.cli.app import app

    os.chdir(folder)
    wishes = "--device cpu --level kernel --mode case --workers 1 --seconds 60"
    app(["campaign", "-b", SWAPPED, *wishes.split()], standalone_mode=False)


def counted(path: Path) -> tuple[int, int]:
    """Cases, and all pairs of values, that a sound database has; none before there is one."""
    if not path.is_file():
        return 0, 0
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not connection.execute("PRAGMA user_version").fetchone()[0]:
            return 0, 0
        cases = connection.execute("SELECT COALESCE(SUM(cases), 0) FROM slices").fetchone()[0]
        return cases, connection.execute("SELECT COALESCE(SUM(cases), 0) FROM pairs").fetchone()[0]


def has_more_than(path: Path, cases: int) -> bool:
    return counted(path)[0] > cases


def waited_for(what: Any, seconds: float = 60.0) -> bool:
    """Whether something came true in time, looked at now and then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        wait([], timeout=0.05)
    return False


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing_and_leave_nobody(tmp_path: Path) -> None:
    path, moments = tmp_path / ".attn-fuzz" / "findings.sqlite", random.Random(5)
    found: set[str] = set()
    before = (0, 0)

    def running() -> bool:
        return any((tmp_path / ".attn-fuzz" / "findings.running").glob("*/*.running"))

    for last in (False, True):
        night_process = new_process.start(run_campaign, (str(tmp_path),), {"ATTN_FUZZ_COMMIT": "this one"})
        # At any moment of a campaign: while its workers start, run, or tell what they found; the last has counted.
        assert waited_for(functools.partial(has_more_than, path, before[0]) if last else running)
        wait([], timeout=2 * moments.random())
        assert night_process.pid is not None
        os.kill(night_process.pid, signal.SIGKILL)
        night_process.join()
        after = counted(path)
        assert after >= before
        assert after[1] >= before[1]
        kept = {each.name for each in (tmp_path / ".attn-fuzz" / "findings").glob("*.json")}
        assert kept >= found
        before, found = after, kept
    store = Store(tmp_path / ".attn-fuzz" / "findings")
    kept_findings = Kept(store)
    suspects: list[Suspect] = []
    recover(tmp_path / ".attn-fuzz" / "findings.running", kept_findings.keep, kept_findings.has_like, suspects.append)
    # Nobody else is accused, though workers were ended in the middle of their cases.
    assert {each.finding.backend for each in suspects} <= {SWAPPED}
    assert {store.load(each).backend for each in store.identifiers()} == {SWAPPED}
