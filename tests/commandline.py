"""What tests of the command line share: a command run in this process, and what it left behind."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from attn_fuzz.cli.app import app
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store
from attn_fuzz.reference.case import Case

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


def shown_commands(text: str) -> list[str]:
    """The command lines of this project in a page or script, without comments and where their output goes."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    found = (re.match(r"(?:[a-z_]+: )?python3? -m attn_fuzz(?=\s|$)([^>|#]*)", line) for line in lines)
    return [match[1].strip() for match in found if match]


def require_exists(words: str | list[str]) -> str:
    """The name of a command; fails where it or one of its options does not exist, as the command line itself does."""
    group = typer.main.get_command(app)
    given = shlex.split(words) if isinstance(words, str) else words
    name, found, rest = group.resolve_command(typer.Context(group), given)  # type: ignore[attr-defined]
    found.make_context(found.name, rest).close()
    return str(name)


FOUND = Finding(
    backend=SWAPPED,
    device="cpu",
    symptom="WrongGradK",
    checks=("budget",),
    messages=("WrongGradK [budget] dk: wrong",),
    case=Case.from_json(CASE),
    original_case=Case(lengths=(3, 4), cuts=(2,)),
    cases_to_find=3,
    seconds_to_find=0.5,
    environment={"torch": "2.13.0"},
)
"""What such a backend is found to do."""


def stored_finding() -> Finding:
    """It, in the store of the command's folder."""
    store = Store(Path(".attn-fuzz/findings"))
    store.prepare()
    store.save(FOUND)
    return FOUND
