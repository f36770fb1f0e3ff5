"""Campaigns on several machines: what they hand over adds up, and a machine that is lost loses what it was running."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from commandline import FOUND, Run, require_exists, sentence

from attn_fuzz import __version__
from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.coverage.counts import Reached
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.nights import cluster, totals
from attn_fuzz.nights.cluster import Cluster
from attn_fuzz.nights.database import Database, DatabaseError, path_beside
from attn_fuzz.nights.handed import Handed, Totals, noted, read, since
from attn_fuzz.nights.kept import Kept
from attn_fuzz.nights.machines import ClusterWishes, Lost, Place
from attn_fuzz.nights.node import Node, Orders
from attn_fuzz.nights.ray_machines import places_of
from attn_fuzz.nights.record import Record
from attn_fuzz.oracle.checks.budget import HISTOGRAM_BINS

ROOT = Path(__file__).resolve().parent.parent
PAIR = (("dtype", "fp32"), ("dtype", "fp32"))
OTHER = dataclasses.replace(FOUND, symptom="WrongOutput", symptoms=({"symptom": "WrongOutput", "tensor": "out"},))
WISHES = ClusterWishes(("cpu",), ("loop",), (), "all", 1, 0, None)


def work(record: Record, cases: int, *, level: str = "kernel", z: float = 1.0) -> None:
    """A slice of so many cases, written."""
    piece = record.begin(Assignment(backend="loop", device="cpu", seed=cases, levels=(level,)))
    tally = Tally(cases=cases, documents=2 * cases, straddling=1, refused=3, repeated=1, seconds=0.5)
    tally.by_kind, tally.paths, tally.known = {f"{level} fp32": cases}, {"a": cases}, {"b": 1}
    tally.worst_z, tally.worst_case = (
        {f"{level} fp32 out": z},
        {f"{level} fp32 out": f'{{"level": "kernel", "lengths": [{round(z)}]}}'},
    )
    # Of the longest row the last bins are empty.
    tally.histograms = {"fp32 out": [*([cases] * cases), *[0] * (HISTOGRAM_BINS - cases)]}
    record.progress(piece, tally)
    reached = Reached()
    reached.pairs[PAIR], reached.lengths[1, 2], reached.refused["no"] = cases, cases, 3
    record.reach(piece, reached)
    record.write(now=True)


def taken(record: Record, pieces: Sequence[Any]) -> None:
    """What was handed over, written."""
    for piece in pieces:
        noted(record, piece)
    record.write(now=True)


def everything(path: Path) -> Totals:
    with Database(path) as database:
        return read(database)


# What is handed over.


def test_what_is_handed_over_adds_up(tmp_path: Path) -> None:
    """In steps, and beside what the other had: as if it had been counted there."""
    here, there, whole = (tmp_path / name for name in ("here", "there", "whole"))
    with Database(here) as mine, Database(whole) as both:
        record, every = Record(mine, 0, None, {}), Record(both, 0, None, {})
        for each in (record, every):
            work(each, 5, z=3.0)
        there.write_bytes(mine.copied())
        with Database(there) as theirs:
            before, other = read(theirs), Record(theirs, 1, None, {})
            assert since(read(theirs), before) == []
            for cases, level, z in ((7, "kernel", 2.0), (11, "layer", 4.0), (2, "kernel", 9.0)):
                for each in (other, every):
                    work(each, cases, level=level, z=z)
                now = read(theirs)
                taken(record, since(now, before))
                before = now
    found, expected = everything(here), everything(whole)
    for name in ("pairs", "lengths", "refused", "counts", "histograms", "largest"):
        assert getattr(found, name) == getattr(expected, name), name
    for key, row in expected.verdicts.items():
        mine_row = found.verdicts[key]
        assert (mine_row.cases, mine_row.documents, mine_row.straddling) == (row.cases, row.documents, row.straddling)
        assert (mine_row.refused, mine_row.repeated) == (row.refused, row.repeated)


def test_a_copy_of_a_database_has_what_is_not_yet_in_its_file(tmp_path: Path) -> None:
    with Database(tmp_path / "one") as database:
        work(Record(database, 0, None, {}), 5)
        (tmp_path / "other").write_bytes(database.copied())
    assert everything(tmp_path / "other") == everything(tmp_path / "one")


# A cluster of machines that are none.


class FakeNode:
    """Counts a case a look, in a database of its own; hands over every other one."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.path, self.place = folder / f"{place.machine}-{time.monotonic_ns()}", place
        self.lost, self.silent, self.looks, self.done, self.version = False, False, 0, 0, __version__
        self.findings: list[Finding] = []
        self.status, self.said = 0, ""
        self.rounds = 0
        self.ends_at: int | None = None
        self.closed = False

    def about(self, device: str) -> dict[str, str]:
        return {"attn_fuzz": self.version, "device": device}

    def begin(self, orders: Orders, database: bytes) -> None:
        self.rounds += 1
        self.looks = 0
        self.path.write_bytes(database)
        with Database(self.path) as opened:
            self.before = read(opened)

    def take(self, *, running: bool = True) -> Handed:
        self.looks += 1
        running = running and self.looks != self.ends_at
        pieces = []
        with Database(self.path) as database:
            if self.status != 2:
                work(Record(database, 1, None, {}), 1)
                self.done += 1
            if self.looks % 2 == 0 or not running:
                now = read(database)
                pieces, self.before = since(now, self.before), now
        findings, self.findings = [each.to_dict() for each in self.findings], []
        return Handed(pieces, findings, running, None if running else self.status, self.said)

    def end(self) -> Handed:
        return self.take(running=False)

    def close(self) -> None:
        self.closed = True


class FakeMachines:
    """Places that come and go as a test says."""

    def __init__(self, folder: Path, *machines: str) -> None:
        self.folder, self.there = folder, [Place(machine, "host", "cpu", 0, 1) for machine in machines]
        self.nodes: list[FakeNode] = []
        self.made: Callable[[FakeNode], None] = lambda node: None

    def places(self) -> Sequence[Place]:
        return list(self.there)

    def start(self, place: Place, name: str) -> FakeNode:
        self.nodes.append(FakeNode(self.folder, place))
        self.made(self.nodes[-1])
        return self.nodes[-1]

    def ask(self, node: FakeNode, method: str, *arguments: Any) -> Any:
        return node, method, arguments

    def answered(self, answers: Sequence[Any], seconds: float) -> Sequence[Any]:
        return [answer for answer in answers if not answer[0].silent]

    def value(self, answer: Any) -> Any:
        node, method, arguments = answer
        if node.lost:
            raise Lost("the machine is gone")
        return getattr(node, method)(*arguments)

    def stop(self, node: FakeNode) -> None:
        node.lost = True

    def close(self) -> None:
        pass


class Watched:
    """A cluster, and a test's say at each step."""

    def __init__(self, tmp_path: Path, machines: FakeMachines, wishes: ClusterWishes = WISHES) -> None:
        self.store = Store(tmp_path / "findings")
        self.store.prepare()
        self.machines, self.step, self.counted = machines, 0, [0]
        self.database = Database(path_beside(self.store.folder))
        self.told: Callable[[int], None] = lambda step: None
        self.cluster = Cluster(wishes, machines, self.database, Kept(self.store), self.show)

    def show(self, view: Any, finding: Finding | None) -> None:
        self.step += finding is None
        self.counted.append(self.cases)
        # Counts never fall.
        assert self.counted[-1] >= self.counted[-2]
        if finding is None:
            self.told(self.step)
        if self.step > 60:
            os.kill(os.getpid(), signal.SIGINT)

    @property
    def cases(self) -> int:
        return sum(row.cases for row in totals.verdicts(self.database))

    def run(self) -> bool:
        with self.database:
            interrupted = self.cluster.run()
            self.final = self.cases
        return interrupted


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines are looked for at each step."""
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.0)


def test_machines_hand_over_and_end_when_they_are_told_to(tmp_path: Path) -> None:
    machines = FakeMachines(tmp_path, "a", "b")
    watched = Watched(tmp_path, machines)

    def told(step: int) -> None:
        if step == 7:
            machines.nodes[0].findings, machines.nodes[1].findings = [FOUND], [OTHER, FOUND]
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    watched.told = told
    assert watched.run()
    assert [node.place.machine for node in machines.nodes] == ["a", "b"]
    assert watched.final == sum(node.done for node in machines.nodes) > 10
    assert set(watched.store.identifiers()) == {FOUND.id, OTHER.id}
    assert sum(watched.cluster.view.findings.values()) == 2
    assert watched.cluster.view.done["loop", "cpu"].cases == watched.final
    assert watched.cluster.view.remarks == []
    assert all(node.closed for node in machines.nodes)


def test_a_lost_machine_loses_what_it_was_running_and_nothing_else(tmp_path: Path) -> None:
    machines = FakeMachines(tmp_path, "a", "b")
    watched = Watched(tmp_path, machines)

    def told(step: int) -> None:
        first = machines.nodes[0]
        if step == 4:
            first.findings = [FOUND]
        if step == 9:
            first.lost = True
            del machines.there[0]
        if step == 14:
            # It comes back.
            machines.there.append(Place("c", "host", "cpu", 0, 1))
        if step == 24:
            os.kill(os.getpid(), signal.SIGINT)

    watched.told = told
    watched.run()
    assert [node.place.machine for node in machines.nodes] == ["a", "b", "c"]
    (remark,) = watched.cluster.view.remarks
    assert "was lost: the machine is gone" in remark
    assert watched.store.identifiers() == (FOUND.id,)
    lost, *others = machines.nodes
    assert watched.final == sum(node.done for node in others) + lost.done - lost.done % 2


def test_rounds_go_on_from_what_all_have_counted(tmp_path: Path) -> None:
    machines = FakeMachines(tmp_path, "a", "b")
    machines.made = lambda node: setattr(node, "ends_at", 3)
    watched = Watched(tmp_path, machines)
    watched.told = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 30 else None
    watched.run()
    assert all(node.rounds > 2 for node in machines.nodes)
    # What a machine has of others is not handed over again.
    assert watched.final == sum(node.done for node in machines.nodes)
    with Database(path_beside(watched.store.folder)) as database:
        told = [json.loads(text)["node"] for text in totals.environments(database)]
    assert set(told) == {"a", "b"}


def test_a_machine_that_can_do_nothing_is_given_up(tmp_path: Path) -> None:
    machines = FakeMachines(tmp_path, "a", "b")

    def made(node: FakeNode) -> None:
        if node.place.machine == "a":
            node.status, node.said, node.ends_at = 2, "attn-fuzz: loop cannot run here", 1
        else:
            node.version = "0.0.1"

    machines.made = made
    watched = Watched(tmp_path, machines)
    assert not watched.run()
    first, second = sorted(watched.cluster.view.remarks, key=lambda remark: "0.0.1" in remark)
    assert first == "host (cpu): loop cannot run here"
    assert f"has attn-fuzz 0.0.1, and not {__version__}" in second
    assert [node.rounds for node in machines.nodes] == [3, 0]


def test_a_machine_that_never_answers_keeps_nobody_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "GRACE", 0.3)
    machines = FakeMachines(tmp_path, "a", "b", "c")

    def made(node: FakeNode) -> None:
        # One waits for cores that others have; another falls silent later.
        node.silent = node.place.machine == "c"

    machines.made = made
    watched = Watched(tmp_path, machines)

    def told(step: int) -> None:
        if step == 6:
            machines.nodes[0].silent = True
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    watched.told = told
    begun = time.monotonic()
    assert watched.run()
    assert time.monotonic() - begun < 10
    (remark,) = watched.cluster.view.remarks
    assert "did not answer at the end" in remark


@pytest.mark.slow
def test_time_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 0.2)
    machines = FakeMachines(tmp_path, "a")
    watched = Watched(tmp_path, machines, dataclasses.replace(WISHES, seconds=1.4))
    watched.step = -(10**6)
    assert not watched.run()
    assert watched.final == machines.nodes[0].done > 0


def test_what_cannot_be_stored_here_stays_where_it_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = FakeMachines(tmp_path, "a")
    watched = Watched(tmp_path, machines)

    def save(self: Store, finding: Finding) -> Path:
        raise StoreError("the disk is full")

    def told(step: int) -> None:
        if step == 5:
            monkeypatch.setattr(Store, "save", save)
            machines.nodes[0].findings = [FOUND]
        if step == 9:
            os.kill(os.getpid(), signal.SIGINT)

    watched.told = told
    watched.run()
    assert watched.cluster.kept.troubles == ["the disk is full"]
    assert [node.closed for node in machines.nodes] == [False]
    assert any("keeps what it found" in remark for remark in watched.cluster.view.remarks)


def test_a_full_disk_loses_no_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = FakeMachines(tmp_path, "a")
    watched = Watched(tmp_path, machines)
    written = Record.write
    fails: list[bool] = []

    def write(self: Record, *, now: bool = False) -> None:
        if 5 < watched.step < 10 and self.database is watched.database:
            fails.append(True)
            raise DatabaseError("the disk is full")
        written(self, now=now)

    monkeypatch.setattr(Record, "write", write)
    watched.told = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 16 else None
    watched.run()
    assert fails
    assert watched.cluster.view.troubles == ["the disk is full"]
    assert watched.final == machines.nodes[0].done


# Places.


@pytest.mark.parametrize(
    ("resources", "kinds", "found"),
    [
        ({"CPU": 8.0}, ("cuda", "cpu"), [("cpu", 0, 8)]),
        ({"CPU": 8.0}, ("cuda",), []),
        ({"CPU": 16.0, "GPU": 2.0}, ("cuda", "cpu"), [("cuda", 0, 5), ("cuda", 1, 5), ("cpu", 2, 5)]),
        ({"CPU": 16.0, "GPU": 2.0}, ("cuda",), [("cuda", 0, 8), ("cuda", 1, 8)]),
        ({"CPU": 16.0, "GPU": 2.0}, ("cpu",), [("cpu", 0, 16)]),
        ({"GPU": 1.0}, ("cuda", "cpu"), [("cuda", 0, 0)]),
        ({}, ("cpu",), []),
    ],
)
def test_each_gpu_is_a_place_and_so_are_the_cores(
    resources: dict[str, float], kinds: tuple[str, ...], found: list[tuple[str, int, int]]
) -> None:
    node = {"NodeID": "a", "NodeManagerHostname": "host", "Alive": True, "Resources": resources}
    assert [place[2:] for place in places_of([node], kinds)] == found
    assert places_of([{**node, "Alive": False}], kinds) == []


def test_orders_are_a_command_line(tmp_path: Path) -> None:
    orders = Orders("cpu", 2, 7, 0.5, ("loop", "backup"), ("kernel",), "batch")
    assert require_exists(orders.words(tmp_path)) == "campaign"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "cuda:1"), "with --ray a device is cpu or cuda"),
        (("--backend", "kernel.py:kernel"), "is a file of this machine"),
        (("--mode", "fast"), "unknown mode 'fast'"),
        (("--level", "model"), "unknown level 'model'"),
    ],
)
def test_what_machines_cannot_do_is_one_sentence(words: tuple[str, ...], said: str, attn_fuzz: Run) -> None:
    assert said in sentence(attn_fuzz("campaign", "--ray", "auto", *words))


@pytest.mark.slow
def test_the_command_prints_what_campaigns_print(
    attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of machines that are none, which end it by all being given up."""
    machines = FakeMachines(tmp_path, "a", "b")

    def made(node: FakeNode) -> None:
        node.findings, node.ends_at = [FOUND], 3
        if len(machines.nodes) == 2:
            machines.nodes[1].silent = True

    def opened(address: str, kinds: Sequence[str]) -> FakeMachines:
        print("as Ray does")
        assert (address, kinds) == ("10.0.0.5:6379", ("cpu",))
        return machines

    machines.made = made
    monkeypatch.setattr("attn_fuzz.cli.night.RayMachines", opened)
    words = ("--ray", "10.0.0.5:6379", "--device", "cpu", "--seconds", "2", "--seed", "4", "--json")
    done = attn_fuzz("campaign", *words)
    assert done.status == 1, done.err
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, of the extra dev")
    jsonschema.validate(done.json, json.loads((ROOT / "attn_fuzz" / "verdict.schema.json").read_text()))
    assert (done.json["verdict"], done.json["interrupted"], done.json["seed"]) == ("findings", False, 4)
    assert done.json["cases"] == machines.nodes[0].done
    assert list(done.json["coverage"]) == ["loop"]
    assert [found["id"] for found in done.json["findings"]] == [FOUND.id]
    assert "as Ray does" in done.err
    listed = attn_fuzz("ledger", "--json").json["entries"]
    assert [len(entry["seen"]) for entry in listed if entry["kind"] == "finding"] == [1]


def test_without_ray_one_sentence_says_so(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "Ray is not installed here" in sentence(attn_fuzz("campaign", "--ray", "auto"))


# The real thing.


def alive(text: str) -> bool:
    """Whether a process of this machine has it on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace"):
                return True
        except OSError:
            continue
    return False


@pytest.mark.slow
def test_a_node_runs_a_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Database(tmp_path / "mine") as mine:
        work(Record(mine, 0, None, {}), 5)
        copy = mine.copied()
    node = Node("node")
    node.begin(Orders("cpu", 1, 3, 100.0, (FOUND.backend,), ("kernel",), "case"), copy)
    handed: list[Handed] = []
    while not any(each.findings for each in handed) or not any(p.reached.pairs for each in handed for p in each.pieces):
        handed.append(node.take())
        assert handed[-1].running, handed[-1]
    handed.append(node.end())
    assert (handed[-1].running, handed[-1].status) == (False, 1)
    pieces = [piece for each in handed for piece in each.pieces]
    assert {piece.backend for piece in pieces} == {FOUND.backend}
    assert sum(piece.tally.cases for piece in pieces) > 0
    node.close()
    assert not (tmp_path / "node").exists()


class RayCluster:
    """Two machines that are processes of this one."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Local

        memory = 80 * 1024 * 1024
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": memory}
        self.local = Local(initialize_head=True, head_node_args=head)
        # An address of its own, or the supervisor's process might be attached to this one, and end with it.
        self.second = self.local.add_node(num_cpus=1, object_store_memory=memory, node_ip_address="127.0.0.2")

    @property
    def address(self) -> str:
        return str(self.local.address)


@pytest.fixture
def ray_cluster() -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="needs ray, of the extra ray")
    made = RayCluster()
    yield made
    made.local.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_goes_on_without_one_of_its_machines(ray_cluster: RayCluster, tmp_path: Path) -> None:
    store = tmp_path / "findings"
    words = ("--ray", ray_cluster.address, "--backend", "loop", "--backend", FOUND.backend, "--level", "kernel")
    command = [sys.executable, "-m", "attn_fuzz", "campaign", *words, "--device", "cpu", "--workers", "1", "--json"]
    process = subprocess.Popen(
        [*command, "--store", str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # Whatever happens, it is over some day.
    alarm = threading.Timer(420.0, process.kill)
    alarm.start()

    def counted() -> dict[str, int]:
        """Cases by node."""
        path = path_beside(store)
        if not path.exists():
            return {}
        with Database(path) as database:
            query = "SELECT environment, SUM(cases) FROM campaigns JOIN slices ON campaign = campaigns.id"
            rows = database.rows(f"{query} GROUP BY campaigns.id")
        found: dict[str, int] = {}
        for text, cases in rows:
            node = json.loads(text)["node"]
            found[node] = found.get(node, 0) + cases
        return found

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)

    wait_for(lambda: len(counted()) == 2)
    ray_cluster.local.remove_node(ray_cluster.second, allow_graceful=False)
    before = counted()
    wait_for(lambda: sum(counted().values()) > sum(before.values()) and len(Store(store).identifiers()) > 0)
    assert all(counted()[node] >= cases for node, cases in before.items())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    alarm.cancel()
    assert process.returncode == 1, err
    assert json.loads(out)["verdict"] == "findings"
    assert all(counted()[node] >= cases for node, cases in before.items())
    assert not alive("attn-fuzz-")
