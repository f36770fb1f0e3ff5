"""The README is true: its tables come from the committed results, its commands run, its example passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Run
from hunts import first_finding

from attn_fuzz.campaign.messages import Assignment
from results.render import bench_table
from results.render import tables as results

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
QUICK = ("--device", "cpu", "--dtype", "fp32", "--workers", "1")
"""One dtype: to find out what a kernel takes is most of the time of such a run."""


def test_tables_are_those_of_the_committed_results() -> None:
    assert results.with_results(README, results.load()) == README, "run python -m results.render.tables"
    assert bench_table.with_speed(README, bench_table.load(), bench_table.load(bench_table.SHARED)) == README, (
        "run python -m results.render.bench_table"
    )


def test_every_command_of_the_readme_exists(attn_fuzz: Run) -> None:
    commands = {line.split("attn_fuzz ")[1].split()[0] for line in README.splitlines() if "-m attn_fuzz " in line}
    assert {"run", "check", "check-layer", "replay", "script", "save", "backends", "faults"} <= commands
    for command in commands:
        assert attn_fuzz(command, "--help").status == 0


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_example_kernel_is_clean(attn_fuzz: Run) -> None:
    done = attn_fuzz("check", f"{ROOT / 'examples' / 'my_kernel.py'}:kernel", *QUICK, "--cases", "10", "--json")
    assert done.status == 0, done.err
    told = done.json
    (mine,) = told["backends"].values()
    # So many of each mode that it is fuzzed by.
    assert sum(count for kind, count in mine["by_kind"].items() if kind.startswith("batch")) == 10
    assert told["cases"] == 20


BREAKS = {
    "top-left": ("mask.tril(ke - kb - (qe - qb))", "mask.tril()"),
    "last-document-scaled": ("torch.cat(out)", "torch.cat([*out[:-1], out[-1] * 1.02])"),
    "empty-documents-shift-keys": (
        "in zip(cu_seqlens_q",
        "in zip(cu_seqlens_q[cu_seqlens_q.diff(append=cu_seqlens_q[-1:] + 1) > 0]",
    ),
}


def broken(folder: Path, name: str) -> Path:
    source = (ROOT / "examples" / "my_kernel.py").read_text()
    right, wrong = BREAKS[name]
    assert right in source
    path = folder / "broken.py"
    path.write_text(source.replace(right, wrong))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_example_kernel_with_one_line_broken_is_convicted(name: str, tmp_path: Path) -> None:
    backend = f"{broken(tmp_path, name)}:kernel"
    # What the limits of the kernel leave of its dtypes and layouts is another test's matter.
    job = Assignment(
        backend=backend, device="cpu", seed=0, cases=300, mode="batch", levels=("kernel",), dtypes=("fp32",)
    )
    case = first_finding(job).case
    assert len(case.lengths) <= 3
    assert case.tokens <= 8
