"""Pairs of channels whose backward FlashAttention 4 has on Hopper: the rule, beside what an H200 said."""

from __future__ import annotations

import re

import pytest

from attn_fuzz.backends import registry
from attn_fuzz.backends.flash4 import VALUE_DIMS, flash4_limit, shared_bytes, takes_values
from attn_fuzz.backends.kernels.flash4 import CONFIGURATIONS
from attn_fuzz.reference.case import Case
from results.render.tables import FOLDER

MEASURED = {
    (int(line[0]), int(line[1])): line[2].startswith("clean")
    for line in re.findall(r"^(\d+) beside (\d+) +(.*)$", (FOLDER / "outside/h200_flash4_values.txt").read_text(), re.M)
}
HALF = {(80, 32)}
"""Clean of few rows, and refused for what dQ is of more."""


def test_the_rule_is_what_was_measured() -> None:
    assert len(MEASURED) == 12
    assert {pair: takes_values(*pair) for pair in MEASURED} == MEASURED | dict.fromkeys(HALF, False)
    assert set(VALUE_DIMS) & set(MEASURED) == {pair for pair, clean in MEASURED.items() if clean} - HALF


def test_shared_memory_is_counted_as_the_error_had_it() -> None:
    assert shared_bytes(64, 128) == 248832
    # As wide as keys there is enough for all that it takes.
    assert all(shared_bytes(dim, dim, masked=masked) <= 232448 for dim in range(8, 257, 8) for masked in (True, False))


@pytest.mark.parametrize(
    ("dims", "causal", "refused"),
    [
        ((128, 192), True, False),
        ((128, 192), False, True),
        ((112, None), True, False),
        ((112, None), False, True),
        ((96, None), False, False),
        ((192, 128), False, False),
    ],
)
def test_without_a_mask_tiles_have_more_rows(dims: tuple[int, int | None], causal: bool, refused: bool) -> None:
    case = Case(level="kernel", lengths=(9,), head_dim=dims[0], head_dim_v=dims[1], causal=causal, dtype="bf16")
    assert (flash4_limit(case) is not None) is refused
    assert flash4_limit(case.replace(window=(3, -1))) is None
    assert (registry.load("flash4").refusal(case, "cuda") is not None) is refused


def test_what_it_compiles_first_is_taken() -> None:
    for chosen in CONFIGURATIONS:
        options = {name: value for name, value in chosen._asdict().items() if name != "window"}
        assert flash4_limit(Case(level="kernel", lengths=(9,), **options)) is None
