"""What a soak has to hold: memory by its rule, planted faults found and shrunk, nobody else accused, shares even."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commandline import FOUND as STORED
from devices import on_every_device

from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store
from attn_fuzz.nights import evenness, soak_findings, soak_kernels, soak_memory
from attn_fuzz.nights.database import DatabaseError
from attn_fuzz.nights.soak import Soak
from attn_fuzz.nights.soak_kernels import FOUND, INNOCENT, MODULE
from attn_fuzz.nights.soak_memory import Kill, Sample
from attn_fuzz.reference.case import Case

MEGABYTE = 1_000_000


def samples(**grows: float) -> list[Sample]:
    """Half an hour of looks, each five seconds, at what grows by so many megabytes, or processes, a minute; one kernel
    in four minutes fills three gigabytes for a while, and workers have what they were given."""
    rng = random.Random(1)

    def grown(name: str, first: float, number: int) -> float:
        return first + grows.get(name, 0.0) * number / 12

    return [
        Sample(
            at=5.0 * number,
            supervisor=int(grown("supervisor", 250, number) * MEGABYTE),
            every=(1200 + 3000 * (number % 48 < 15)) * MEGABYTE,
            processes=int(grown("processes", 6, number)),
            servers=int(grown("servers", 220, number) * MEGABYTE),
            worker=int(grown("worker", 240 + rng.uniform(0, 40) + 900 * (number % 48 < 15), number) * MEGABYTE),
        )
        for number in range(360)
    ]


@pytest.mark.parametrize(
    ("grows", "flat"),
    [
        ({}, True),
        ({"supervisor": 1}, True),
        ({"supervisor": 3}, False),
        ({"servers": 1}, True),
        ({"servers": 3}, False),
        ({"worker": 1}, True),
        ({"worker": 4}, False),
        ({"processes": 0.1}, False),
    ],
)
def test_memory_is_flat_by_the_rule(grows: dict[str, float], flat: bool) -> None:
    told = soak_memory.flatness(samples(**grows), starts=[0.0])
    assert told["flat"] is flat
    assert json.loads(json.dumps(told)) == told
    assert not flat or all(each < 0.1 for each in told["rise"].values())


def test_kernels_that_fill_the_memory_and_starts_do_not_count() -> None:
    starts = [0.0, 300.0, 900.0]
    some = samples()
    for number, sample in enumerate(some):
        if any(0 <= sample.at - start < 25 for start in starts):
            some[number] = sample._replace(supervisor=30 * MEGABYTE, every=30 * MEGABYTE, processes=1, worker=0)
    told = soak_memory.flatness(some, starts)
    assert (told["flat"], told["supervisor_megabytes"], told["servers_megabytes"]) == (True, 250, 220)
    assert 240 <= told["worker_megabytes"] < 280
    assert told["most_megabytes"] == 4200
    assert soak_memory.flatness([], [])["flat"]


def test_slopes_are_medians_of_slopes() -> None:
    line = [(float(x), 3.0 * x) for x in range(9)]
    assert soak_memory.slope(line) == 3.0
    assert soak_memory.slope([*line[:4], (4.0, 1e9), *line[5:]]) == pytest.approx(3.0, rel=0.3)
    assert soak_memory.slope(line[:1]) == soak_memory.slope([]) == 0.0


def test_the_least_slope_that_is_likely_is_that_of_no_growth_in_nineteen_of_twenty_cases() -> None:
    rng = random.Random(2)
    found = [soak_memory.least_slope([(float(x), rng.gauss(100, 20)) for x in range(12)]) for _ in range(400)]
    assert 0.02 < sum(each > 0 for each in found) / 400 < 0.08
    line = [(float(x), 3.0 * x) for x in range(9)]
    assert soak_memory.least_slope(line) == pytest.approx(3.0)
    assert soak_memory.least_slope([]) == 0.0


def test_what_a_sample_tells_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Soak, "start", lambda self: SimpleNamespace(pid=1))
    moments = iter((0.0, 5.0, 11.0))
    monkeypatch.setattr(Soak, "now", lambda self: next(moments))
    running = Soak(tmp_path, 2, ("cpu",), (), 0)
    parents = {1: 0, 2: 1, 3: 1, 10: 2, 11: 2, 12: 2}
    monkeypatch.setattr("attn_fuzz.nights.soak.processes", lambda token: dict(parents))
    monkeypatch.setattr("attn_fuzz.nights.soak.memory_of", lambda pid: pid * MEGABYTE)
    assert running.sample() == Sample(0.0, MEGABYTE, 39 * MEGABYTE, 6, 5 * MEGABYTE, 0)
    # One has ended, and a new one has just begun.
    del parents[12]
    parents[99] = 2
    running.sample()
    assert running.sample().worker == 10 * MEGABYTE


def test_a_picture_is_drawn_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = [Kill(60.0, True), Kill(90.0, False)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not soak_memory.draw(tmp_path / "memory.png", samples(), [0.0], kills, "a soak")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert soak_memory.draw(tmp_path / "memory.png", samples(), [0.0], kills, "a soak")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


# Findings.


def finding(name: str, symptom: str, case: Case, drawn: Case | None = None) -> Finding:
    backend = f"{MODULE}:{name}" if name in (*FOUND, *INNOCENT) else name
    return dataclasses.replace(STORED, backend=backend, symptom=symptom, case=case, original_case=drawn or case)


SMALL, LARGE = Case(level="kernel", lengths=(1,), head_dim=1), Case(level="kernel", lengths=(40, 30), head_dim=4)


def test_planted_faults_are_kept_and_shrunk() -> None:
    raw = finding("wrong", "WrongOutput", LARGE)
    told = soak_findings.planted([raw, finding("hanging", "Hung", SMALL, LARGE), finding("crashing", "Hung", SMALL)])
    assert {name: (each["kept"], each["shrunk"]) for name, each in told.items()} == {
        "crashing": (False, False),
        "hanging": (True, True),
        "rubbish": (False, False),
        "wrong": (True, False),
    }
    assert told["wrong"]["case"] == LARGE.to_dict()
    # One that is shrunk is enough.
    (shrunk,) = (
        each["shrunk"]
        for name, each in soak_findings.planted([raw, finding("wrong", "WrongOutput", SMALL, LARGE)]).items()
        if name == "wrong"
    )
    assert shrunk
    assert soak_findings.others([raw]) == []


def test_whoever_does_nothing_wrong_is_accused_of_nothing() -> None:
    some = [
        finding("loop", "WrongOutput", SMALL),
        finding("filling", "Crashed", SMALL),
        finding("wrong", "Hung", SMALL),
    ]
    said = soak_findings.others(some)
    assert [sentence.rpartition(" (")[0] for sentence in said] == [
        "loop was accused of WrongOutput",
        "filling was accused of Crashed",
        "wrong was accused of Hung",
    ]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(STORED)
    (tmp_path / "0123456789.json").write_text("{")
    wrong: list[str] = []
    assert list(soak_findings.stored(tmp_path, wrong)) == [STORED]
    assert "is damaged" in wrong[0]


def test_a_soak_says_what_did_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Soak, "start", lambda self: self.starts.append(0.0))
    running = Soak(tmp_path, 2, ("cpu",), (), 0)
    Store(tmp_path / "findings").prepare()
    Store(tmp_path / "findings").save(STORED)
    running.look()
    (tmp_path / "findings" / f"{STORED.id}.json").unlink()
    running.look()
    told = running.findings()
    assert not any(each["kept"] for each in told["planted"].values())
    sentences = [sentence.partition(": ")[2] for sentence in running.wrong]
    assert sentences[0] == f"findings are lost: ['{STORED.id}']"
    assert sentences[1:] == [f"{name} was not found to be {symptom}" for name, symptom in FOUND.items()]


# Kernels that misbehave.


def called(name: str, queries: int, channels: int = 4, device: str = "cpu") -> object:
    q = torch.ones(queries, 2, channels, device=device)
    ends = torch.tensor([0, queries], dtype=torch.int32, device=device)
    return getattr(soak_kernels, name)(q, q[:, :1], q[:, :1], ends, ends, queries, queries, causal=True)


@on_every_device
def test_there_is_a_kernel_for_everything_that_a_campaign_has_to_survive(device: str) -> None:
    assert {*FOUND, *INNOCENT} == {"crashing", "hanging", "leaking", "filling", "printing", "rubbish", "wrong"}
    # Each computes what is right where it does nothing else.
    for name in (*FOUND, *INNOCENT):
        if name != "rubbish":
            out = called(name, 1, device=device)
            assert isinstance(out, torch.Tensor)
            assert torch.equal(out, torch.ones(1, 2, 4, device=device)), name
    soak_kernels._LEAKED.clear()


def test_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    called("printing", 3)
    assert "a kernel that prints" in capsys.readouterr().out
    before = len(soak_kernels._LEAKED)
    called("leaking", 3)
    assert len(soak_kernels._LEAKED) == before + 1
    soak_kernels._LEAKED.clear()
    assert called("rubbish", 1) is None
    assert called("rubbish", 2) == "an output"
    wrong = called("wrong", 1, 64)
    assert isinstance(wrong, torch.Tensor)
    assert not torch.equal(wrong, torch.ones(1, 2, 64))


# Shares.


def test_no_backend_may_have_less_than_a_fifth_of_the_median() -> None:
    rates = {"a": 100.0, "b": 90.0, "c": 19.0, "slow": 1.0, "slower": 0.5}
    told = evenness.evenness(rates, ("slow", "slower"))
    assert told["even"]
    assert told["quick"] == {
        "median": 90.0,
        "verdicts_per_axis_value": {"a": 100.0, "b": 90.0, "c": 19.0},
        "of_median": {"a": 1.111, "b": 1.0, "c": 0.211},
    }
    assert told["compiled"]["of_median"] == {"slow": 1.333, "slower": 0.667}
    assert not evenness.evenness({**rates, "c": 17.0}, ("slow", "slower"))["even"]
    assert evenness.evenness({}, ())["even"]
    assert evenness.per_value({("dtype", "fp32"): 4, ("dtype", "bf16"): 0}) == 2.0
    assert evenness.per_value({}) == 0.0


def test_shares_of_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="there is no campaign database"):
        evenness.of_store(tmp_path)
