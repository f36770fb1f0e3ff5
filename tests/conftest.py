"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Done, Run

from attn_fuzz.cli.app import main


@pytest.fixture
def attn_fuzz(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in a folder of its own; workers are processes as ever."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["attn-fuzz", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capfd.readouterr())

    return run
