"""Each of a hundred wrong inputs is one sentence with its exit status, and docs/wrong_inputs.md says which."""

from __future__ import annotations

import pytest
from wrong_inputs import TABLES, Wrong, committed, said, without_phrasing

ROWS = [row for rows in TABLES.values() for row in rows]


def test_there_are_more_than_forty_and_each_is_another() -> None:
    assert len({row.shown for row in ROWS}) == len(ROWS) > 40
    assert list(committed()) == [row.shown for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.shown.replace("`", "").replace("/", " "))
def test_a_wrong_input_is_one_sentence_that_the_page_has(row: Wrong) -> None:
    what = said(row)
    assert what.status in ("2", "CheckError", "ValueError")
    assert "Traceback" not in what.sentence
    assert without_phrasing(what) == without_phrasing(committed()[row.shown])
