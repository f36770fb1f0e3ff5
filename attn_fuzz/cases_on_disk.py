"""Where a named case comes from: a JSON file, a stored finding, or a regression seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_fuzz.store import Store
from reference.case import Case, CaseError

REGRESSIONS = Path("tests") / "regressions"
"""Regression seeds of the project in whose folder the command runs."""


@dataclasses.dataclass(frozen=True)
class Seed:
    """A saved case; optionally why it is kept, and the backends that must fail it."""

    name: str
    case: Case
    about: str = ""
    convicts: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The content of its file."""
        data: dict[str, Any] = {"about": self.about, "convicts": list(self.convicts), "case": self.case.to_dict()}
        return json.dumps(data, indent=2) + "\n"


def read_seed(path: Path) -> Seed:
    """A case from a file: a bare case, a regression seed, or a stored finding.

    Raises:
        CaseError: when the file cannot be read or holds no possible case.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CaseError(f"{path} cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise CaseError(f"{path} is not valid JSON: {error}") from None
    try:
        if isinstance(data, Mapping) and "case" in data:
            convicts = data.get("convicts") or ([data["backend"]] if "backend" in data else [])
            return Seed(path.stem, Case.from_dict(data["case"]), str(data.get("about", "")), tuple(convicts))
        return Seed(path.stem, Case.from_dict(data))
    except CaseError as error:
        raise CaseError(f"{path}: {error}") from None


def regression_seeds(folder: Path = REGRESSIONS) -> tuple[Seed, ...]:
    """All regression seeds, by name."""
    return tuple(read_seed(path) for path in sorted(folder.glob("*.json")))


def find_seed(name: str, store: Path) -> Seed:
    """A case by path, by regression name, or by finding id.

    Raises:
        CaseError: for an unreadable file.
        StoreError: when nothing of that name is found.
    """
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return read_seed(path)
    if (REGRESSIONS / f"{name}.json").is_file():
        return read_seed(REGRESSIONS / f"{name}.json")
    finding = Store(store).load(name)
    return Seed(name, finding.case, "; ".join(finding.messages[:1]), (finding.backend,))
