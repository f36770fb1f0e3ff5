"""What compute-sanitizer said of a finding's script: a file beside the finding, so that stores merge by copying."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from attn_fuzz.findings.store import StoreError, is_file, write_whole

FOLDER: Final = "sanitized"
"""Of a store."""

FORMAT: Final = 1
"""Of its files."""

TOOLS: Final = ("memcheck", "initcheck", "racecheck", "synccheck")
"""Of compute-sanitizer: accesses outside of memory, reads of what was never written, races, barriers."""

CLEAN: Final = "clean"
ERRORS: Final = "errors"
NOT_RUN: Final = "not run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolVerdict:
    """Of one tool."""

    tool: str
    verdict: str
    """``clean``, ``errors``, or ``not run`` where it ended without a verdict."""
    errors: int = 0
    warnings: int = 0
    """Of racecheck: hazards that a warp may have."""
    messages: tuple[str, ...] = ()
    """Kinds of errors, and how often each was printed."""
    why: str = ""
    """Why there is no verdict, or only a part of one."""
    script: str = ""
    """What the script itself said in that run: ``wrong``, ``right`` or ``not run``."""
    on: str = ""
    """Device and versions."""
    date: str = ""

    def __str__(self) -> str:
        parts = [f"{self.errors} error{'s' * (self.errors != 1)}" if self.verdict == ERRORS else self.verdict]
        if self.warnings:
            parts.append(f"{self.warnings} warning{'s' * (self.warnings != 1)}")
        said = "; ".join((*self.messages, *filter(None, [self.why])))
        return f"{self.tool}: {', '.join(parts)}" + (f": {said}" if said else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sanitized:
    """Of one finding."""

    finding: str
    """Its id."""
    entry: str
    """The id of its bug in the ledger."""
    tools: Mapping[str, ToolVerdict]

    def with_tools(self, verdicts: Iterable[ToolVerdict]) -> Sanitized:
        """With newer verdicts; of a tool that ended without one an older one stays."""
        tools = dict(self.tools)
        for each in verdicts:
            if each.verdict != NOT_RUN or tools.get(each.tool, each).verdict == NOT_RUN:
                tools[each.tool] = each
        return dataclasses.replace(self, tools=tools)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        tools = {name: {**dataclasses.asdict(each), "messages": [*each.messages]} for name, each in self.tools.items()}
        return {"format": FORMAT, "finding": self.finding, "entry": self.entry, "tools": tools}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sanitized:
        """The inverse of ``to_dict``. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        tools = {
            str(name): ToolVerdict(**{**each, "messages": tuple(map(str, each["messages"]))})
            for name, each in data["tools"].items()
        }
        return cls(finding=str(data["finding"]), entry=str(data["entry"]), tools=tools)


def _path(store: Path, finding: str) -> Path:
    return store / FOLDER / f"{finding}.json"


def read(store: Path, finding: str) -> Sanitized | None:
    """What is kept of a finding; None where nothing is.

    Args:
        store: the folder of findings.
        finding: its id.

    Raises:
        StoreError: when it cannot be read.
    """
    path = _path(store, finding)
    if not is_file(path):
        return None
    try:
        data = json.loads(path.read_text())
        if int(data["format"]) > FORMAT:
            raise StoreError(f"{path} was written by a newer version (format {data['format']}); upgrade attn-fuzz")
        return Sanitized.from_dict(data)
    except StoreError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__} {error}); delete it, and sanitize again") from None


def of_entry(store: Path, entry: str) -> list[Sanitized]:
    """What is kept of the findings of one bug.

    Raises:
        StoreError: when a file cannot be read.
    """
    every = (read(store, path.stem) for path in sorted((store / FOLDER).glob("*.json")))
    return [each for each in every if each is not None and each.entry == entry]


def write(store: Path, sanitized: Sanitized) -> Path:
    """Keeps what was said of a finding, whole or not at all.

    Raises:
        StoreError: when it cannot be written.
    """
    path = _path(store, sanitized.finding)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(sanitized.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise StoreError(f"{path} could not be written ({error.strerror})") from None
    return path
