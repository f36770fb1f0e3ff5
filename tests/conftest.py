"""Fixtures that several test modules share, and which tests come first."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    # By the process, too, that hands out tests and needs no torch.
    from commandline import Done, Run


@pytest.fixture
def attn_fuzz(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in a folder of its own; workers are processes as ever."""
    from commandline import Done

    from attn_fuzz.cli.app import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["attn-fuzz", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capfd.readouterr())

    return run


_KEPT: Final = 1 << 30
"""Bytes of a GPU that torch may hold on to from one test to the next."""


@pytest.fixture(autouse=True)
def memory_is_left_to_others() -> Iterator[None]:
    """A worker of pytest keeps no gigabytes that its tests have freed: sixteen share a GPU, and some tests ask for half
    of it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        device = torch.cuda.current_device()
        if torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > _KEPT:
            torch.cuda.empty_cache()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands do, they do here: they ask a user's kernel what it takes, and hunt, without a process for it."""
    from in_turn import InThisProcess, InTurn

    from attn_fuzz.campaign import limits
    from attn_fuzz.cli import campaigns

    monkeypatch.setattr(limits, "Isolated", InThisProcess)
    monkeypatch.setattr(campaigns, "Pool", InTurn)


LONGEST: Final = (
    "test_backend_agrees_with_reference[flex_compiled",
    "test_nor_are_they_on_a_gpu[",
    "test_wheel.py",
    "test_triton_example.py",
    "test_every_backend_that_takes_them_is_right_on_a_gpu",
    "test_saved_cases_are_clean[flex_compiled",
    "test_backend_agrees_with_reference[",
)
"""Words in the names of tests that take a minute and more, on GPUs most of them, where compilers do."""


def longest_first(names: list[str], workers: int) -> list[int]:
    """An order of tests in which each worker's share, one after another and of even size, begins with long ones.

    Args:
        names: of the tests.
        workers: how many share them.
    """

    def rank(name: str) -> int:
        return next((place for place, word in enumerate(LONGEST) if word in name), len(LONGEST))

    ranks = [rank(name) for name in names]
    long = sorted((index for index in range(len(names)) if ranks[index] < len(LONGEST)), key=lambda i: ranks[i])
    rest = (index for index in range(len(names)) if ranks[index] == len(LONGEST))
    order: list[int] = []
    for worker in range(workers):
        share = (len(names) - len(order)) // (workers - worker)
        own = long[worker::workers][:share]
        order += [*own, *itertools.islice(rest, share - len(own))]
    # Where some share is full of long ones others are left.
    return [*order, *sorted({*range(len(names))} - {*order})]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """None of the longest tests is left for the end, when the other workers have nothing to do any more."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        items[:] = [items[index] for index in longest_first([item.nodeid for item in items], workers)]
