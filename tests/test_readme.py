"""The README is true: its tables come from the committed results, its commands run, its example passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from results.render import bench_table
from results.render import tables as results

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def attn_fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attn_fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_tables_are_those_of_the_committed_results() -> None:
    assert results.with_results(README, results.load()) == README, "run python -m results.render.tables"
    assert bench_table.with_speed(README, bench_table.load(), bench_table.load(bench_table.SHARED)) == README, (
        "run python -m results.render.bench_table"
    )


def test_every_command_of_the_readme_exists() -> None:
    commands = {line.split("attn_fuzz ")[1].split()[0] for line in README.splitlines() if "-m attn_fuzz " in line}
    assert {"run", "check", "check-layer", "replay", "script", "save", "backends", "faults"} <= commands
    for command in commands:
        assert attn_fuzz(command, "--help").returncode == 0


def test_example_kernel_is_clean(tmp_path: Path) -> None:
    kernel = "examples/my_kernel.py:kernel"
    done = attn_fuzz("check", kernel, "--device", "cpu", "--cases", "20", "--json", "--store", str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (mine,) = told["backends"].values()
    # So many of each mode that it is fuzzed by.
    assert sum(count for kind, count in mine["by_kind"].items() if kind.startswith("batch")) == 20
    assert told["cases"] == 40


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mask.tril(ke - kb - (qe - qb))", "mask.tril()"),
        ("torch.cat(out)", "torch.cat([*out[:-1], out[-1] * 1.02])"),
        ("in zip(cu_seqlens_q", "in zip(cu_seqlens_q[cu_seqlens_q.diff(append=cu_seqlens_q[-1:] + 1) > 0]"),
    ],
    ids=["top-left", "last-document-scaled", "empty-documents-shift-keys"],
)
def test_example_kernel_with_one_line_broken_is_convicted(tmp_path: Path, right: str, wrong: str) -> None:
    source = (ROOT / "examples" / "my_kernel.py").read_text()
    assert right in source
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(right, wrong))
    options = ("--device", "cpu", "--cases", "300", "--first", "--json", "--store", str(tmp_path / "store"))
    done = attn_fuzz("check", f"{broken}:kernel", *options)
    assert done.returncode == 1, done.stderr
    finding = json.loads(done.stdout)["findings"][0]
    assert len(finding["case"]["lengths"]) <= 3
    assert sum(finding["case"]["lengths"]) <= 8
