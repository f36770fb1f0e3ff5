"""A silent process is asked where it is: what compiles or imports has its time, what does neither has hung."""

from __future__ import annotations

import itertools
import runpy
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from attn_fuzz.campaign import new_process
from attn_fuzz.campaign.watch import Watch

SOON, MOST = 40.0, 180.0
WAITS = "import threading\nthreading.Event().wait()\n"
HOLDS_THE_LOCK = "import re\nre.match('(a*)*b', 'a' * 60)\n"
CALLS_A_COMPILER = "import subprocess\nsubprocess.run(['sleep', '600'])\n"


def patience(folder: Path, name: str, text: str) -> Iterator[float]:
    """With a process that runs such a file and is silent, time after time."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    watch = Watch(new_process.context(), itertools.count(0.0, 10.0).__next__)
    process = new_process.start(runpy.run_path, (str(path),), {}, daemon=True, watch=watch)
    deadline = time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            found = watch.patience(process.pid, 20.0, SOON, MOST)
            if watch.answers >= 3:
                yield found
                # As if it had said something: the first answers may have come while it was still importing.
                watch.patience(process.pid, 0.0, SOON, MOST)
            wait([watch.told], 1.0)
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("text", [WAITS, HOLDS_THE_LOCK], ids=["waits", "holds the lock"])
def test_a_process_that_waits_has_hung(text: str, tmp_path: Path) -> None:
    assert SOON in patience(tmp_path, "kernel.py", text)


ELSEWHERE = pytest.param("kernel.py", CALLS_A_COMPILER, id="in another process")


@pytest.mark.parametrize(("name", "text"), [pytest.param("numba/compiler.py", WAITS, id="here"), ELSEWHERE])
def test_one_that_compiles_has_its_time(name: str, text: str, tmp_path: Path) -> None:
    assert 20.0 + SOON in patience(tmp_path, name, text)


def test_one_that_does_not_answer_has_its_time() -> None:
    watch = Watch(new_process.context())
    assert watch.patience(None, 100.0, SOON, MOST) == MOST
