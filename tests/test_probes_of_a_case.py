"""How many of the probes a case is asked in a campaign, and which."""

from __future__ import annotations

from collections import Counter

import pytest

from attn_fuzz.oracle.checks import PROBES
from attn_fuzz.oracle.examine import some_probes
from attn_fuzz.reference.case import Case

CASE = Case(level="kernel", lengths=(3, 5), head_dim=2)
OVER_RANKS = Case(level="layer", lengths=(4, 4), cuts=(4,), heads=2, head_dim=2, hidden=4, ranks=2)


@pytest.mark.parametrize(("case", "share"), [(CASE, 4), (OVER_RANKS, 5)], ids=["kernel", "over ranks"])
def test_each_probe_is_asked_of_as_many_cases(case: Case, share: int) -> None:
    cases = [case.replace(seed=seed) for seed in range(2_000)]
    asked = Counter(probe for each in cases for probe in some_probes(each) if probe in PROBES)
    assert set(asked) == set(PROBES)
    for probe, times in asked.items():
        assert len(cases) / share == pytest.approx(times, rel=0.25), probe


def test_a_case_is_asked_the_same_ones_each_time_and_all_that_are_named() -> None:
    assert some_probes(CASE) == some_probes(Case.from_json(CASE.to_json()))
    assert some_probes(CASE, PROBES[:2]) == PROBES[:2]


def test_a_crowd_is_asked_none() -> None:
    assert some_probes(CASE.replace(lengths=(1,) * 20_000)) == ()
