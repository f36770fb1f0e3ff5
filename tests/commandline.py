"""What tests of the command line share: a command run in this process, and what it left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CASE = '{"level": "kernel", "lengths": [2], "head_dim": 2}'
SWAPPED = "fault:M51-swapped"
"""A backend that fails it."""


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output, in JSON as the standard has it."""

        def refuse(constant: str) -> float:
            raise ValueError(f"{constant} is no JSON")

        assert self.out.count("\n") == 1
        result: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return result


Run = Callable[..., Done]


def sentence(done: Done) -> str:
    """The one sentence with which a command refuses; nothing else is printed."""
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    return line


def write(name: str, text: str | bytes) -> None:
    """A file in the command's folder."""
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
