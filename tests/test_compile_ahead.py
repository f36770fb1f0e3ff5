"""Processes that compile ahead: what they take is told, and what they die of is left to the worker."""

from __future__ import annotations

import os
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from attn_fuzz.backends.kernel import Configuration
from attn_fuzz.campaign.compile_ahead import PATIENCE, Ahead
from attn_fuzz.campaign.configuration_pool import Step
from attn_fuzz.campaign.isolated import Subject

KERNEL = f"{Path(__file__).parent / 'slow_first_call.py'}:kernel"
CAUSAL = Configuration("fp32", 8, 1, 1, True)


def taken(ahead: Ahead) -> float:
    """What a configuration took, when it is compiled or its process has ended."""
    assert ahead._connection is not None
    while (seconds := ahead.taken()) is None:
        wait([ahead._connection])
    return seconds


@pytest.mark.slow
def test_one_process_compiles_one_configuration_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_FUZZ_COMPILING", "0.25")
    ahead = Ahead(Subject(KERNEL, "cpu"), {})
    try:
        for step in (Step(CAUSAL), Step(CAUSAL._replace(causal=False)), Step(CAUSAL, 2)):
            ahead.give(step)
            assert ahead.at_work == step
            assert taken(ahead) >= (0.0 if step.layouts else 0.25)
            assert ahead.at_work is None
    finally:
        ahead.close()


@pytest.mark.slow
def test_what_it_dies_of_counts_as_compiled_and_another_follows(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os\n\n\ndef kernel(q, k, v, cu, cu_k, most, most_k):\n    os._exit(3)\n")
    ahead = Ahead(Subject(f"{tmp_path / 'dies.py'}:kernel", "cpu"), {})
    for _ in range(2):
        ahead.give(Step(CAUSAL._replace(causal=False)))
        process = ahead._process
        assert process is not None
        assert taken(ahead) > 0
        assert process.exitcode == 3
        assert ahead.at_work is None
    ahead.close()


def test_what_never_ends_is_left_to_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def kill(self) -> None: ...

        def join(self) -> None: ...

    now, held = [0.0], list[int]()

    def start(target: object, args: tuple[Any, ...], added: object, *, daemon: bool) -> Silent:
        held.append(os.dup(args[-1].fileno()))
        return Silent()

    monkeypatch.setattr("attn_fuzz.campaign.new_process.start", start)
    ahead = Ahead(Subject(KERNEL, "cpu"), {}, clock=lambda: now[0])
    ahead.give(Step(CAUSAL))
    now[0] = PATIENCE
    assert ahead.taken() is None
    now[0] = PATIENCE + 1
    assert ahead.taken() == PATIENCE + 1
    assert ahead.at_work is None
    os.close(*held)
