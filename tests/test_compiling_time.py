"""What a worker's calls spend compiling, by the clock of the test."""

from __future__ import annotations

import pytest

from attn_fuzz.campaign.compiling_time import CompilingTime


class Calls:
    """Calls that take as long as the test says, and compile what it says."""

    def __init__(self) -> None:
        self.now, self.variants = 0.0, 0
        self.time = CompilingTime(lambda: self.variants, lambda: self.now)

    def call(self, seconds: float, variants: int = 0) -> None:
        self.now += seconds
        self.variants += variants
        self.time.end()


@pytest.fixture
def calls() -> Calls:
    return Calls()


def test_what_triton_tells_of_counts_however_short(calls: Calls) -> None:
    calls.call(0.05, variants=2)
    calls.call(8.0, variants=1)
    calls.call(0.05)
    assert calls.time.spent == pytest.approx(8.05)


def test_a_call_that_is_far_slower_than_others_counts_where_nothing_is_told(calls: Calls) -> None:
    for _ in range(8):
        calls.call(0.1)
    calls.call(0.15)
    assert calls.time.spent == 0
    calls.call(5.0)
    calls.call(0.1)
    assert calls.time.spent == pytest.approx(5.0)


def test_a_slow_kernel_does_not_compile(calls: Calls) -> None:
    for _ in range(20):
        calls.call(3.0)
    assert calls.time.spent == 0


def test_what_is_done_between_calls_does_not_count(calls: Calls) -> None:
    for _ in range(8):
        calls.call(0.1)
    calls.now += 100.0
    calls.time.begin()
    calls.call(0.1)
    assert calls.time.spent == 0
