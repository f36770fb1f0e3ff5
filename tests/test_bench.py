"""The bench measures what it says, and its object keeps its promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attn_fuzz.backends import registry
from attn_fuzz.cli.bench import show_processes
from attn_fuzz.evaluation import bench
from attn_fuzz.evaluation.bench_calls import batches_shared_of, settled_rate
from attn_fuzz.evaluation.bench_processes import BenchError, processes_of
from attn_fuzz.execution.timing import median

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
SMALL = bench.dataclasses.replace(
    bench.PLANS["cpu"], documents=64, narrow_seconds=0.5, rare=(3, 7), rare_longest=(5, 9)
)


@pytest.mark.slow
def test_the_command_prints_one_object_of_the_promised_form(tmp_path: Path) -> None:
    # The same command with a small plan.
    program = (
        "import dataclasses; from attn_fuzz.evaluation import bench as b; "
        "b.PLANS['cpu'] = dataclasses.replace(b.PLANS['cpu'], documents=32, "
        "narrow_hunt=12, processes=(), batch_processes=(), plain_cases=3, narrow_cases=5, rare=(3, 7), "
        "rare_longest=(5, 9)); "
        "from attn_fuzz.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, "bench", "--device", "cpu", "--json", "--backend", "loop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (row,) = told["backends"]
    for key in ("bare_kernel_s", "wide_documents_per_s", "narrow_cases_per_s", "narrow_documents_per_s"):
        assert row[key] > 0, key
    assert row["name"] == "loop"
    assert row["wide"]["seconds"] >= row["wide"]["parts"]["reference"]
    assert told["rare"]["shrunk"] == {"level": "kernel", "lengths": [3], "key_lengths": [7], "head_dim": 1}
    assert told["plain"]["cases_per_s"] > 0


@pytest.mark.slow
def test_the_command_measures_processes_too() -> None:
    program = (
        "import dataclasses, attn_fuzz.evaluation.bench as b; b.PLANS['cpu'] = dataclasses.replace(b.PLANS['cpu'], "
        "batch_documents=12, batch_seconds=0.4); from attn_fuzz.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, "bench", "--processes", "--device", "cpu", "--json", "-b", "loop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["processes"]["loop"]["2"]["cases_per_s"] > 0
    assert told["environment"]["device"]
    assert "loop, 2 processes" in done.stderr
    console = Console(record=True, width=100)
    show_processes(console, told)
    assert f"{told['processes']['loop']['2']['cases_per_s']:,.0f}" in console.export_text()


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


@pytest.mark.slow
def test_processes_share_a_device() -> None:
    plan = bench.dataclasses.replace(SMALL, batch_documents=12)
    said: list[str] = []
    found = processes_of(("loop", "backup"), (1, 2), 0.3, "cpu", plan, said.append)
    assert list(found) == ["loop", "backup"]
    assert all(list(rates) == ["1", "2"] for rates in found.values())
    for rates in found.values():
        assert all(each["bare_calls_per_s"] > each["cases_per_s"] > 0 for each in rates.values())
    assert len(said) == 4


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


@pytest.mark.slow
def test_processes_as_a_campaign_has_them_are_measured() -> None:
    rate = batches_shared_of("loop", "cpu", 2, 2.0)
    assert rate is None or rate > 0


@pytest.mark.slow
def test_a_lost_process_is_told() -> None:
    with pytest.raises(BenchError, match="died"):
        processes_of(("nobody",), (1,), 0.1, "cpu", SMALL, lambda line: None)
