"""What a worker writes into files before it tells it, so that nothing is lost where its parent is killed, too.

A worker's notes are three kinds of files whose names begin alike: ``.running`` with the case that is about to run,
``.candidate`` with a finding that is being shrunk, ``.found-N`` with one that is. They are JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attn_fuzz.campaign.messages import Assignment, Candidate, Found, Message, Trying
from attn_fuzz.findings.finding import Finding

RUNNING, CANDIDATE, FOUND = ".running", ".candidate", ".found-"


class Running(NamedTuple):
    """What a worker was about to run when it was last heard of."""

    backend: str
    device: str
    trying: Trying
    since: float = 0.0
    """When that was, in seconds since 1970."""


class Notes(NamedTuple):
    """What can be read of some workers' notes."""

    running: list[Running]
    candidates: list[Finding]
    found: list[Finding]


def noting(assignment: Assignment, send: Callable[[Message], None]) -> Callable[[Message], None]:
    """A way to send messages that writes down first what must not be lost.

    Args:
        assignment: whose ``notes`` say where; its folder exists.
        send: what sends them.
    """
    beginning = assignment.notes
    numbers = iter(range(1 << 30))

    def note(message: Message) -> None:
        # On a full disk the parent still hears of it.
        with contextlib.suppress(OSError):
            match message:
                case Trying(case, ends):
                    place = {"backend": assignment.backend, "device": assignment.device}
                    write(f"{beginning}{RUNNING}", {**place, "case": case, "ends": ends, "since": time.time()})
                case Candidate(finding):
                    write(f"{beginning}{CANDIDATE}", finding.to_dict())
                case Found(finding):
                    # More than one worker may have had these notes, one after another.
                    write(f"{beginning}{FOUND}{os.getpid()}-{next(numbers)}", finding.to_dict())
                    Path(f"{beginning}{CANDIDATE}").unlink(missing_ok=True)
        send(message)

    return note


def write(name: str, data: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all."""
    temporary = f"{name}.tmp"
    with open(temporary, "w") as file:
        json.dump(data, file)
    os.replace(temporary, name)


def read(folder: Path) -> Notes:
    """The notes in a folder; what cannot be read is left out."""
    running = [
        Running(data["backend"], data["device"], Trying(data["case"], tuple(data["ends"])), data.get("since", 0.0))
        for data in readable(folder, f"*{RUNNING}")
    ]
    return Notes(running, list(_findings(folder, f"*{CANDIDATE}")), list(_findings(folder, f"*{FOUND}*[0-9]")))


def readable(folder: Path, pattern: str) -> Iterator[Any]:
    """What the files of a folder with such names hold; those that cannot be read are left out."""
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads(path.read_text())


def _findings(folder: Path, pattern: str) -> Iterator[Finding]:
    for data in readable(folder, pattern):
        with contextlib.suppress(ValueError):
            yield Finding.from_dict(data)
