"""The table of documents in other company in docs/results.md, from campaigns and tables of axes."""

from __future__ import annotations

from typing import Any

from results.render.tables import FOLDER, PAGE, company_table, load


def told(environment: dict[str, str], **kinds: dict[str, Any]) -> dict[str, Any]:
    return {"environment": {"device": "GPU", "torch": "2.0", **environment}, **kinds}


def test_other_bits_are_added_up_over_campaigns_and_axes() -> None:
    some = {"counted": {"company forward": 30, "company forward, other bits": 4, "company backward": 7}}
    more = {"counted": {"company forward": 1500, "company forward, other bits": 1}}
    campaign = told({"flash-attn": "2"}, backends={"flash": some, "legacy:flash": some})
    axes = told({}, axes={"alone and in company": {"flash": more, "loop": {}}, "streams": {"flash": more}})
    other = told({"torch": "2.1"}, backends={"flash": some})
    lines = company_table([campaign, axes, other])
    assert [line for line in lines if line.startswith("**")] == ["**GPU, torch 2.0**", "**GPU, torch 2.1**"]
    assert [line for line in lines if line.startswith("| ") and "backend" not in line] == [
        "| flash | 6 of 3,030 | 0 of 7 |",
        "| loop | - | - |",
        "| flash | 4 of 30 | 0 of 7 |",
    ]


def test_the_table_is_that_of_the_committed_results() -> None:
    lines = company_table([*load(FOLDER / "company"), *load(FOLDER / "axes")])
    assert "\n".join(lines) in PAGE.read_text()
    # Each backend that there is on the GPU has some.
    assert sum(line.startswith("| ") and " of " in line for line in lines) >= 25
