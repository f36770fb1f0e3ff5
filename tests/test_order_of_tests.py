"""The longest tests come first in each worker's share."""

from __future__ import annotations

import pytest

from conftest import LONGEST, longest_first


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
@pytest.mark.parametrize("long", [0, 1, 5, 40])
def test_each_share_begins_with_long_ones(workers: int, long: int) -> None:
    names = [f"tests/test_it.py::test_{place}" for place in range(61)]
    names[20:20] = [f"tests/test_it.py::{LONGEST[place % len(LONGEST)]}{place}]" for place in range(long)]
    order = longest_first(names, workers)
    assert sorted(order) == list(range(len(names)))
    first = 0
    for worker in range(workers):
        share = (len(names) - first) // (workers - worker)
        kinds = ["test_it.py::test_" in names[index] and "]" not in names[index] for index in order[first:][:share]]
        assert kinds == sorted(kinds)
        assert kinds.count(False) in (long // workers, -(-long // workers))
        first += share
