"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands do, they do here: they ask a user's kernel what it takes, and hunt, without a process for it."""
    from in_turn import InThisProcess, InTurn

    from attn_fuzz.campaign import limits
    from attn_fuzz.cli import campaigns

    monkeypatch.setattr(limits, "Isolated", InThisProcess)
    monkeypatch.setattr(campaigns, "Pool", InTurn)
