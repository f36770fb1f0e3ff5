"""A script, run: whether the fault is still there, in a process that has nothing of this one's."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

WRONG: Final = "wrong"
RIGHT: Final = "right"
NOT_RUN: Final = "not run"

_THERE: Final = "the fault is there"
_GONE: Final = "the fault is gone"


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a script said."""

    status: int | None
    """Exit status; None where it did not come back."""
    output: str
    """Standard output, and behind it the last line of standard error."""

    @property
    def said(self) -> str:
        """``wrong``, ``right`` or ``not run`` by its last words, whatever its exit status is."""
        lines = {line.split(":")[0] for line in self.output.splitlines()[-3:]}
        return WRONG if _THERE in lines else RIGHT if _GONE in lines else NOT_RUN

    @property
    def answer(self) -> str:
        """``wrong``, ``right``, or ``not run`` where it ended before it could tell."""
        return self.said if self.status == {WRONG: 1, RIGHT: 0}.get(self.said) else NOT_RUN


def run_script(text: str, seconds: float, folder: Path | None = None) -> Ran:
    """Runs a script.

    Args:
        text: its source.
        seconds: after which it is ended.
        folder: the working directory; None for this one.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "reproduce.py"
        path.write_text(text)
        try:
            done = subprocess.run(
                [sys.executable, str(path)],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=seconds,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                check=False,
            )
        except subprocess.TimeoutExpired as ended:
            said = ended.stdout or b""
            return Ran(None, said if isinstance(said, str) else said.decode(errors="replace"))
    last = done.stderr.strip().splitlines()[-1:]
    return Ran(done.returncode, "\n".join([*done.stdout.strip().splitlines(), *(last if done.returncode else [])]))
