"""The bench measures what it says, and its object keeps its promises."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import Run
from rich.console import Console

from attn_fuzz.backends import registry
from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.cli.bench import show_processes
from attn_fuzz.evaluation import bench, bench_calls
from attn_fuzz.evaluation.bench_calls import batches_shared_of, settled_rate
from attn_fuzz.evaluation.bench_processes import BenchError, Job, bench_processes, measure_processes
from attn_fuzz.execution.timing import median

CPU = torch.device("cpu")
SMALL = bench.dataclasses.replace(bench.PLANS["cpu"], documents=64, case_seconds=0.5, rare=(3, 7), rare_longest=(5, 9))


@pytest.mark.slow
def test_the_command_prints_one_object_of_the_promised_form(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"documents": 32, "layer_documents": 32, "batch_documents": 12, "case_hunt": 4, "drawn_cases": 5}
    plan = bench.dataclasses.replace(SMALL, **few, processes=(), batch_processes=(), plain_cases=3)
    monkeypatch.setitem(bench.PLANS, "cpu", plan)
    done = attn_fuzz("bench", "--device", "cpu", "--json", "--backend", "loop")
    assert done.status == 0, done.err
    told = done.json
    (row,) = told["backends"]
    for key in ("bare_kernel_s", "wide_documents_per_s", "narrow_cases_per_s", "narrow_documents_per_s"):
        assert row[key] > 0, key
    assert row["name"] == "loop"
    assert row["packed"]["seconds"] >= row["packed"]["parts"]["reference"]
    assert told["rare"]["shrunk"] == {"level": "kernel", "lengths": [3], "key_lengths": [7], "head_dim": 1}
    assert told["plain"]["cases_per_s"] > 0


@pytest.mark.slow
def test_an_interrupted_measurement_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.dataclasses.replace(
        bench.PLANS["cpu"], batch_documents=12, batch_seconds=0.2, batch_processes=(1,), layer_processes=(1,)
    )
    monkeypatch.setitem(bench.PLANS, "cpu", plan)

    def say(line: str) -> None:
        raise KeyboardInterrupt

    result = bench_processes("cpu", ("loop", "backup"), say, ("kernel",))
    assert result["interrupted"]
    assert list(result["processes"]) == ["loop"]
    assert result["processes"]["loop"]["1"]["cases_per_s"] > 0


@pytest.mark.slow
def test_a_process_that_is_lost_takes_nothing_with_it(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.dataclasses.replace(bench.PLANS["cpu"], batch_documents=12, batch_seconds=0.2, batch_processes=(1,))
    monkeypatch.setitem(bench.PLANS, "cpu", plan)
    measured = bench_processes.__globals__["measure_processes"]

    def losing(job: Job, say: Callable[[str], None], found: dict[str, dict[str, dict[str, float]]]) -> None:
        def killing(line: str) -> None:
            say(line)
            for child in multiprocessing.active_children():
                child.kill()

        measured(job, killing, found)

    monkeypatch.setitem(bench_processes.__globals__, "measure_processes", losing)
    command = ("bench", "--processes", "--device", "cpu", "--level", "kernel", "--json")
    done = attn_fuzz(*command, "-b", "loop", "-b", "backup")
    assert done.status == 2
    assert "a process of the measurement died: see its own words above; the rest was not measured" in done.err
    assert list(done.json["processes"]) == ["loop"]


@pytest.mark.slow
def test_the_command_measures_processes_that_share_a_device(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.dataclasses.replace(
        bench.PLANS["cpu"], batch_documents=12, batch_seconds=0.4, batch_processes=(2,), layer_processes=(2,)
    )
    monkeypatch.setitem(bench.PLANS, "cpu", plan)
    done = attn_fuzz(
        "bench", "--processes", "--number", "2", "--number", "1", "--device", "cpu", "--json", "-b", "loop"
    )
    assert done.status == 0, done.err
    found = done.json["processes"]
    assert list(found) == ["loop"]
    assert all(list(rates) == ["2", "1"] for rates in found.values())
    for rates in found.values():
        assert all(each["bare_calls_per_s"] > each["cases_per_s"] > 0 for each in rates.values())
        assert all(each["bare_layers_per_s"] > each["layer_cases_per_s"] > 0 for each in rates.values())
    assert done.json["environment"]["device"]
    assert done.err.count("processes: ") == 4
    assert "loop, 2 processes" in done.err
    console = Console(record=True, width=100)
    show_processes(console, done.json)
    text = console.export_text()
    assert f"{found['loop']['2']['cases_per_s']:,.0f}" in text
    assert f"{found['loop']['2']['bare_layers_per_s']:,.0f}" in text


@pytest.mark.slow
def test_a_users_layer_is_measured_by_itself(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.dataclasses.replace(bench.PLANS["cpu"], batch_seconds=0.4, batch_processes=(1,), layer_processes=(1,))
    monkeypatch.setitem(bench.PLANS, "cpu", plan)
    example = Path(__file__).resolve().parent.parent / "examples" / "my_layer.py"
    done = attn_fuzz("bench", "--processes", "--device", "cpu", "--json", "-b", f"layer:{example}:Layer")
    assert done.status == 0, done.err
    ((_, by_count),) = done.json["processes"].items()
    assert set(by_count["1"]) == {"layer_cases_per_s", "bare_layers_per_s"}


@pytest.mark.slow
def test_the_rare_fault_shrinks_to_what_the_backend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = registry.load("loop").kernel
    monkeypatch.setattr(kernel, "capabilities", bench.dataclasses.replace(kernel.capabilities, dtypes=("bf16",)))
    shrunk = bench.rare_of(SMALL, "loop", CPU)["shrunk"]
    assert shrunk == {"level": "kernel", "lengths": [3], "key_lengths": [7], "head_dim": 1, "dtype": "bf16"}


def test_an_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(plan: object, backend: registry.Backend, *rest: object, **more: object) -> dict[str, object]:
        if backend.name == "backup":
            raise KeyboardInterrupt
        return {"name": backend.name, "bare_kernel_s": 1.0}

    monkeypatch.setattr(bench, "row_of", row)
    told = bench.bench("cpu", ("loop", "backup", "sdpa_dense"), lambda line: None)
    assert told["interrupted"]
    assert [entry["name"] for entry in told["backends"]] == ["loop"]


def test_layouts_are_as_stated() -> None:
    plan = bench.PLANS["cuda"]
    case = bench.layout(plan, 500)
    assert case == bench.layout(plan, 500)
    assert (case.dtype, case.head_dim, case.heads, case.kv_heads) == ("bf16", 64, 4, 2)
    assert min(case.lengths) == 1
    assert max(case.lengths) == 64
    assert max(case.packed_key_lengths) == 128


@pytest.mark.slow
def test_a_kernel_whose_time_grows_with_the_square_is_given_fewer_documents() -> None:
    plan = bench.dataclasses.replace(SMALL, documents=512)
    found = bench.fitting(plan, registry.load("backup"), CPU)
    assert found is not None
    assert len(found[0].lengths) < 512


def test_medians_do_not_count_the_first_run() -> None:
    runs: list[int] = []
    median(lambda: runs.append(1), CPU, repeats=3)
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("seen", "rate"),
    [
        ([], None),
        # All of the first batches at once, then silence, then the ends: nothing was seen at work.
        ([(0.0, 4), (0.1, 8), (9.0, 8), (9.1, 8)], None),
        ([(0.0, 4), *((at, 100 * at) for at in range(1, 11))], 100.0),
    ],
)
def test_a_rate_is_of_settled_processes_or_none(seen: list[tuple[float, int]], rate: float | None) -> None:
    assert settled_rate(seen, 2) == rate


def test_one_process_compiles_before_any_is_measured_and_there_is_more_time_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, float]] = []
    settled = [(float(at), 100 * at) for at in range(11)]

    def messages(name: str, device: str, processes: int, seconds: float) -> list[tuple[float, int]]:
        asked.append((processes, seconds))
        return settled if len(asked) > 2 else []

    monkeypatch.setattr(bench_calls, "_messages", messages)
    assert batches_shared_of("loop", "cpu", 2, 2.0) == 100.0
    assert [processes for processes, _ in asked] == [1, 2, 2]
    assert asked[0][1] < asked[1][1] == 2.0 < asked[2][1]
    monkeypatch.setattr(bench_calls, "_messages", lambda *_: [])
    assert batches_shared_of("loop", "cpu", 2, 2.0) is None


def test_a_campaign_is_heard_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Assignment] = []

    class Told:
        def __init__(self, assignments: list[Assignment], workers: int, note: Callable[..., None], _: object) -> None:
            jobs.extend(assignments)
            self.note = note

        def run(self) -> None:
            for cases in (3, 7):
                self.note({"loop": Tally(cases=cases)})

    monkeypatch.setattr(bench_calls, "Pool", Told)
    (first, three), (second, seven) = bench_calls._messages("loop", "cpu", 2, 0.5)
    assert (three, seven) == (3, 7)
    assert first <= second
    assert {job.mode for job in jobs} == {"batch"}
    assert len({job.seed for job in jobs}) == 2
    assert {job.seconds for job in jobs} == {0.5}


@pytest.mark.slow
def test_a_lost_process_is_told() -> None:
    with pytest.raises(BenchError, match="died"):
        measure_processes(Job(("loop",), {"kernel": (1,)}, 0.1, "nowhere", SMALL, ("kernel",)), lambda line: None, {})
