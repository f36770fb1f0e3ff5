"""The README is true: tables come from committed results, commands that are shown exist or run, the example passes."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path

import pytest
from commandline import Run, require_exists, shown_commands, stored_finding
from hunts import first_finding

import attn_fuzz.api  # noqa: F401
from attn_fuzz.api import Verdict
from attn_fuzz.campaign.messages import Assignment
from results.render import bench_table
from results.render import tables as results

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
QUICK = ("--device", "cpu", "--dtype", "fp32", "--workers", "1")
"""One dtype: to find out what a kernel takes is most of the time of such a run."""


def test_tables_are_those_of_the_committed_results() -> None:
    page = results.PAGE.read_text()
    assert results.with_results(page, results.load()) == page, "run python -m results.render.tables"
    assert results.LARGEST_Z.read_text() == results.z_tables(results.load()), "run python -m results.render.tables"
    assert bench_table.with_speed(page, bench_table.load(), bench_table.load(bench_table.SHARED)) == page, (
        "run python -m results.render.bench_table"
    )


def test_figures_of_the_readme_are_those_of_the_tables() -> None:
    rows = results.fault_rows(results.load())
    assert f"{sum(row['caught'] for row in rows)} of {len(rows)} are caught from every seed" in README
    power = [row for result in results.load() for row in result.get("power", ()) if row["length"] <= 16_384]
    assert all(seen == (0 if kind.endswith("none") else 100) for row in power for kind, seen in row["seen"].items())


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 180
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_shown_exists(page: str) -> None:
    for command in shown_commands(PAGES[page]):
        require_exists(command)


def test_the_readme_shows_every_command_of_a_first_day() -> None:
    names = {require_exists(command) for command in shown_commands(README)}
    assert {"run", "check", "check-layer", "init", "list", "replay", "script", "save", "backends", "faults"} <= names


def test_commands_on_findings_work(attn_fuzz: Run) -> None:
    finding = stored_finding()
    for command in shown_commands(README):
        name, *words = re.sub(r"\bID\b|8176dbedf3", finding.id, command).replace("NAME", "kept").split()
        if name in ("list", "show", "replay", "script", "save"):
            assert attn_fuzz(name, *words).status == (1 if name == "replay" else 0), command


def code_after(words: str) -> str:
    """The block of a page of code that follows a sentence."""
    block = README.partition(words)[2].partition("\n\n")[2]
    return textwrap.dedent(re.match(r"(?:(?:    .*)?\n)+", block)[0])  # type: ignore[index]


def test_own_results_are_held_to_their_budget_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    exec(code_after("channel that is wrong:"), {})


def test_the_test_that_is_shown_is_one(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def check(kernel: object, **options: object) -> Verdict:
        asked.append((kernel, options["seconds"], options["dtype"]))
        return Verdict({"cases": 1, "findings": []})

    monkeypatch.setattr("attn_fuzz.api.check", check)
    pytester.makepyfile("import pytest\n\n" + code_after("cases in `tests/regressions` are tests:"))
    pytester.runpytest_inprocess("-p", "attn_fuzz.pytest_plugin", "-p", "no:xdist").assert_outcomes(passed=1)
    assert asked == [("my_kernel.py:kernel", 20, ["bf16"])]


# The two command lines that do everything.


def test_ci_runs_the_two_command_lines_as_they_stand() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    begin, end = script.index("readme() {"), script.index("\nstep ")
    # What it reads, printed instead of run.
    told = script[begin:end] + 'printf "%s\\n" "$first" "$second"'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", told], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert re.findall(r'^eval "\$(\w+)"', script, re.MULTILINE) == ["first", "second", "second"]
    assert re.fullmatch(r'pip install -e "\.\[dev\]" && python -m attn_fuzz run --seconds \d+', first)
    assert second == "pytest -n auto"
    blocks = [block.strip() for block in re.findall(r"\n\n((?:    .*\n)+)", README)]
    assert blocks[:2] == [first, second]


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
