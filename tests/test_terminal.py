"""What people read, on terminals of 80 and 140 columns."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from commandline import FOUND
from rich.console import Console

from attn_fuzz.backends import registry
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.pool import Outcome
from attn_fuzz.cli import bench, tables
from attn_fuzz.cli.columns import Column, broken_behind, fitted
from attn_fuzz.cli.terminal import Screen
from attn_fuzz.reference.case import Case
from results.render.bench_plot import load

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (80, 140)
FOUND_ON = dataclasses.replace(FOUND, backend="sdpa_nested_efficient", symptom="WrongParameterGradient")
TALLY = Tally(
    cases=132_665,
    documents=833_477,
    straddling=40_111,
    refused=12_345,
    worst_z={"layer bf16 d_key_value": 8.04},
    known={"cudnn-masked-backward-nan": 632},
)
NAMES = ("sdpa_nested_efficient", "flash3_deterministic", "their_kernels/attention/varlen_forward.py:packed_attention")
OUTCOME = Outcome(tallies=dict.fromkeys(NAMES, TALLY), findings=[FOUND_ON], seconds=60.0)


def console(width: int, *, terminal: bool = False) -> Console:
    options: dict[str, Any] = {"legacy_windows": False, "color_system": None}
    return Console(file=io.StringIO(), width=width, height=50, force_terminal=terminal, **options)


def printed(to: Console) -> str:
    """What it was told, of which no line is longer than it is wide."""
    text = to.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= to.width
    return str(text)


def cells(text: str) -> set[str]:
    """Every word in a table."""
    return {word for line in text.splitlines() for cell in re.split("[│┃]", line) for word in cell.split()}


@pytest.mark.parametrize("width", WIDTHS)
def test_names_and_numbers_of_a_campaign_stay_whole(width: int) -> None:
    tables.print_campaign(to := console(width), OUTCOME)
    text = printed(to)
    assert {"sdpa_nested_efficient", "flash3_deterministic", "132665", "833477", "d_key_value)"} <= cells(text)
    # A path has no room, and is broken behind a separator.
    assert "varlen_forward.py:" in text
    assert "packed_attention" in text
    assert ("no room for: straddling, refused" in text) == (width == 80)
    assert ("40111" in text) == (width == 140)
    assert "sdpa_nested_efficient: 632 cases are explained by the known issue cudnn-masked-backward-nan" in " ".join(
        text.split()
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_findings_stay_whole(width: int) -> None:
    tables.print_findings_table(to := console(width), [FOUND_ON, dataclasses.replace(FOUND_ON, backend=NAMES[2])])
    assert {FOUND_ON.id, "WrongParameterGradient", "sdpa_nested_efficient", "packed_attention"} <= cells(printed(to))


@pytest.mark.parametrize("width", WIDTHS)
def test_backends_stay_whole(width: int) -> None:
    rows = [(name, place, "needs a GPU") for name in registry.backend_names() for place in ("cpu", "cuda")]
    tables.print_backends(to := console(width), rows)
    assert set(registry.backend_names()) <= cells(printed(to))


@pytest.mark.parametrize("width", WIDTHS)
def test_faults_and_rates_stay_whole(width: int) -> None:
    faults = json.loads((ROOT / "results" / "faults.json").read_text())["faults"]
    tables.print_faults(to := console(width), faults)
    assert {row["id"] for row in faults} <= cells(printed(to))
    (measured,) = (result for result in load() if "H100" in result["environment"]["device"])
    measured["backends"] = [row | {"packed": {**row["packed"], "parts": {}}} for row in measured["backends"]]
    bench.show(to := console(width), measured | {"interrupted": False})
    assert {row["name"] for row in measured["backends"]} <= cells(printed(to))


def test_what_looks_like_markup_is_printed() -> None:
    tables.print_findings(to := console(80), [dataclasses.replace(FOUND, backend="[b]/k.py:kernel")], None)
    tables.verdict_lines(to, Case(lengths=(1,)), [("[b]/k.py:kernel", "it takes [tokens] only")])
    text = printed(to)
    assert text.count("[b]/k.py:kernel") == 2
    assert "[tokens]" in text


def test_columns_are_left_out_the_last_first() -> None:
    columns = [Column("name", name=True), Column("first", spare=True), Column("second", spare=True), Column("about")]
    row = ("n" * 10, "f" * 20, "s" * 20, "some words")
    widths = {width: fitted(columns, [row], width)[1] for width in (80, 60, 30)}
    assert widths == {80: [], 60: ["second"], 30: ["first", "second"]}


def test_names_break_behind_separators() -> None:
    assert broken_behind("a/bb/ccc.py:kernel", 9) == "a/bb/\nccc.py:\nkernel"
    assert broken_behind("kernel", 3) == "kernel"
    assert broken_behind("a/b:c", 20) == "a/b:c"


# Progress.


def lines(to: Console) -> list[str]:
    """The lines of progress that are on the terminal now: what was last drawn, below what is printed above it."""
    drawn = to.file.getvalue().rpartition("\x1b[2K")[2]  # type: ignore[attr-defined]
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn).splitlines() if line.strip()]


@pytest.mark.parametrize("width", WIDTHS)
def test_lines_of_backends_at_work(width: int) -> None:
    to = console(width, terminal=True)
    with Screen(NAMES, 60.0, None, to) as screen:
        tally = dataclasses.replace(TALLY, seconds=30.0)
        screen.update(dict.fromkeys(NAMES, tally))
        screen.refresh()
        shown = lines(to)
        assert len(shown) == 3
        assert all(len(line) <= width for line in shown)
        for name, line in zip(
            ("sdpa_nested_efficient", "flash3_deterministic", "packed_attention"), shown, strict=True
        ):
            assert name in line
            assert "132665 cases" in line
            assert "0 findings" in line
            assert "━" in line
            assert ("833477 documents" in line) == (width == 140)
        # A finding is counted when it is found, and once where a smaller one takes its place.
        screen.found(FOUND_ON)
        screen.found(FOUND_ON)
        screen.refresh()
        assert "1 findings" in lines(to)[0]
        screen.ended(NAMES[0])
        screen.ended(NAMES[2])
        screen.refresh()
        (left,) = lines(to)
        assert "flash3_deterministic" in left
    # Nothing is left of them but what was found.
    assert lines(to) == []


def test_nothing_is_left_where_there_is_no_terminal() -> None:
    with Screen(NAMES, None, 10, to := console(80)) as screen:
        screen.update(dict.fromkeys(NAMES, TALLY))
        screen.found(FOUND_ON)
    (line,) = to.file.getvalue().split("\n\n")[0].splitlines()  # type: ignore[attr-defined]
    assert line.startswith("WrongParameterGradient on sdpa_nested_efficient: {")
