"""The tables of axes in docs/results.md are those of the committed results, and say what files say together."""

from __future__ import annotations

from typing import Any

import pytest

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.evaluation.axes import measured
from attn_fuzz.evaluation.axes_rows import ROWS
from results.render import axes
from results.render.tables import PAGE, load

GRADIENT, MERGED, GRAPHS, STREAMS = ROWS[0].name, ROWS[1].name, "CUDA graphs", "streams"


def had(asked: int, cases: int, z: float, **known: int) -> dict[str, Any]:
    """What a file says of a row and a backend."""
    told = measured(ROWS[0], Tally(cases=cases, worst_z={"kernel fp32 dq": z}, known=known), 1.0)
    return {**told, "asked": asked}


def result(rows: dict[str, Any], *findings: str, refused: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """A file of results, with one finding of each of the backends."""
    return {
        "axes": rows,
        "not_taken": [{"row": row, "backend": name, "why": "it is not declared"} for row, name in refused],
        "findings": [{"backend": name} for name in findings],
        "cases_wanted": 2000,
        "environment": {"device": "GPU", "torch": "2.0", "commit": "abc", "date": "2026-11-30"},
    }


ONE = result(
    {
        GRADIENT: {"loop": had(1500, 1500, 6.44, strides=1)},
        MERGED: {"loop": had(900, 6000, 5.0, strides=2), "nested": had(0, 6000, 9.0, other=1)},
        GRAPHS: {"nested": had(0, 0, 0.0)},
    },
    "loop",
    refused=((GRADIENT, "nested"), (GRAPHS, "loop")),
)
TWO = result(
    {GRADIENT: {"loop": had(700, 700, 6.26, strides=1), "flash": had(1999, 1999, 6.3, strides=3, casts=1)}}, "flash"
)


def cells(lines: list[str], name: str) -> list[str]:
    """The line of a table that begins with a name."""
    (line,) = [each for each in lines if each.startswith(f"| {name} |")]
    return line.strip("| ").split(" | ")


def column(lines: list[str], row: str, backend: str) -> str:
    """A cell of the table of backends; without outer bars an empty last cell would be lost."""
    (line,) = [each for each in lines if each.startswith(f"| {backend} |")]
    return line.split("|")[2 + list(axes.COLUMNS).index(row)].strip()


def test_the_tables_are_those_of_the_committed_results() -> None:
    page, told = PAGE.read_text(), load(axes.FOLDER)
    assert axes.with_axes(page, told) == page, "run python -m results.render.axes"
    # What has no column is not shown.
    assert {row for each in told for row in each["axes"]} <= set(axes.COLUMNS)


def test_every_row_has_a_column_in_their_order() -> None:
    assert list(axes.COLUMNS) == [row.name for row in ROWS]
    assert len(set(axes.COLUMNS.values())) == len(ROWS)


def test_files_add_up() -> None:
    lines = axes.axes_tables([ONE, TWO])
    asterisk = "A cell with an asterisk has fewer than the 2,000 that were wanted."
    assert lines[1] == f"On GPU, torch 2.0; commits abc (2026-11-30). {asterisk}"
    assert column(lines, GRADIENT, "loop") == "2,200"
    assert column(lines, GRADIENT, "flash") == "1,999*"
    assert column(lines, MERGED, "loop") == "900*"
    assert cells(lines, "LSE gradient")[2:] == [
        "2",
        "1,999",
        "2,200",
        "4,199",
        "6.4 (loop)",
        "1 to 2",
        "casts 1, strides 5",
    ]


def test_what_a_backend_does_not_take() -> None:
    lines = axes.axes_tables([ONE, TWO])
    assert column(lines, GRADIENT, "nested") == "-", "it is not declared"
    assert column(lines, MERGED, "nested") == "-", "none of its cases could be asked"
    assert column(lines, GRAPHS, "nested") == "0*", "it had none"
    assert column(lines, MERGED, "flash") == "", "it was not tried"
    # Its errors and known issues are not the question's.
    assert cells(lines, "merged")[2:] == ["1", "900", "900", "900", "5.0 (loop)", "0 to 1", "strides 2"]
    assert cells(lines, "streams")[2:] == ["0", "-", "-", "-", "-", "0", "-"]


def test_what_one_file_could_not_ask_another_did() -> None:
    lines = axes.axes_tables([ONE, result({MERGED: {"nested": had(2000, 9000, 5.5)}})])
    assert column(lines, MERGED, "nested") == "2,000"


def test_what_none_could_be_drawn_for_is_not_taken() -> None:
    """As of what is known to end a process; of what no time was left for there is nothing to say but that."""
    tried = {STREAMS: {"cudnn": had(0, 0, 0.0)}}
    for refused, cell in (((), "0*"), (((STREAMS, "cudnn"),), "-")):
        lines = axes.axes_table(axes.had_of([result(tried, refused=refused)]), 2000)
        assert column(lines, STREAMS, "cudnn") == cell


def test_what_was_refused_once_and_is_tried_since_is_not_refused() -> None:
    refusing = result({}, refused=((STREAMS, "cudnn"),))
    tried = result({STREAMS: {"cudnn": had(0, 0, 0.0)}})
    for results, cell in (([refusing, tried], "0*"), ([tried, refusing], "-"), ([refusing], "-")):
        assert column(axes.axes_table(axes.had_of(results), 2000), STREAMS, "cudnn") == cell


def test_a_finding_is_of_a_row_that_its_backend_was_tried_on() -> None:
    assert axes.findings([ONE], GRADIENT) == axes.findings([ONE], MERGED) == "0 to 1"
    assert axes.findings([ONE], GRAPHS) == axes.findings([TWO], MERGED) == "0"
    assert axes.findings([TWO, TWO], GRADIENT) == "2"
    told = {**ONE, "findings": [{**finding, "rows": [MERGED]} for finding in ONE["findings"]]}
    assert axes.findings([told], MERGED) == "1"
    assert axes.findings([told], GRADIENT) == "0"


def test_each_device_and_version_has_tables_of_its_own() -> None:
    other = {**TWO, "environment": {**TWO["environment"], "torch": "2.1"}}
    lines = axes.axes_tables([other, ONE])
    assert [line.partition(";")[0] for line in lines if line.startswith("On ")] == [
        "On GPU, torch 2.0",
        "On GPU, torch 2.1",
    ]


def test_runs_that_differ_in_what_packages_are_there_have_one_table() -> None:
    other = {**TWO, "environment": {**TWO["environment"], "flash-attn": "2.8"}}
    lines = axes.axes_tables([ONE, other])
    (title,) = [line.partition(";")[0] for line in lines if line.startswith("On ")]
    assert title == "On GPU, torch 2.0, flash-attn 2.8"
    assert column(lines, GRADIENT, "loop") == "2,200"


def test_without_results_nothing_is_said() -> None:
    filled = axes.with_axes(PAGE.read_text(), [ONE, TWO])
    assert "2,200" in filled.partition("<!-- axes: python -m results.render.axes -->")[2]
    emptied = axes.with_axes(filled, [])
    assert "<!-- axes: python -m results.render.axes -->\n\n<!-- end of axes -->\n" in emptied
    assert axes.with_axes(emptied, [ONE, TWO]) == filled


def test_a_page_without_a_place_for_them_is_an_error() -> None:
    with pytest.raises(ValueError, match="no section between"):
        axes.with_axes("# What has been measured", [])
