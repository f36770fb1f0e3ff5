"""Where a named case comes from: a JSON file, a stored finding, or a regression seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_fuzz.findings.store import Store, is_file
from attn_fuzz.reduction.call_sequence import Company, company_of
from attn_fuzz.reference.case import Case, CaseError

REGRESSIONS = Path("tests") / "regressions"
"""Regression seeds of the project in whose folder the command runs."""


@dataclasses.dataclass(frozen=True)
class Seed:
    """A saved case; optionally why it is kept, and the backends that must fail it."""

    name: str
    case: Case
    about: str = ""
    convicts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Backends that must fail it, by ``cpu`` and ``cuda``."""
    symptom: str = ""
    """A stored finding's; empty where none is known."""
    company: Company | None = None
    """Calls in a row, where the case fails among them only."""

    def to_json(self) -> str:
        """The content of its file: one line per entry."""
        entries: dict[str, Any] = {"about": self.about, "case": self.case.to_dict()}
        if self.company is not None:
            entries["company"] = self.company.to_dict()
        if self.convicts:
            entries["convicts"] = {device: list(names) for device, names in self.convicts.items()}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        return f"{{\n{lines}\n}}\n"


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
            about, symptom = str(data.get("about", "")), str(data.get("symptom", ""))
            return Seed(path.stem, Case.from_dict(data["case"]), about, _convicts(data), symptom, company_of(data))
        return Seed(path.stem, Case.from_dict(data))
    except CaseError as error:
        raise CaseError(f"{path}: {error}") from None


def _convicts(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Who must fail: a seed's own list, or the backend of a stored finding."""
    if "backend" in data and "device" in data:
        return {str(data["device"]).partition(":")[0]: (str(data["backend"]),)}
    convicts = data.get("convicts", {})
    if not isinstance(convicts, Mapping) or not all(isinstance(names, list) for names in convicts.values()):
        raise CaseError('convicts must name backends by device, as in {"cpu": ["legacy:loop"]}')
    return {str(device): tuple(map(str, names)) for device, names in convicts.items()}


def regression_seeds(folder: Path = REGRESSIONS) -> tuple[Seed, ...]:
    """All regression seeds, by name."""
    return tuple(read_seed(path) for path in sorted(folder.glob("*.json")))


def find_seed(name: str, store: Path) -> Seed:
    """A case by path, by regression name, by finding id, or as JSON text.

    Raises:
        CaseError: for an unreadable file or impossible case.
        StoreError: when nothing of that name is found.
    """
    if name.lstrip().startswith("{"):
        return Seed("case", Case.from_json(name))
    path = Path(name)
    if path.suffix == ".json" or is_file(path):
        return read_seed(path)
    if is_file(REGRESSIONS / f"{name}.json"):
        return read_seed(REGRESSIONS / f"{name}.json")
    finding = Store(store).load(name)
    device = finding.device.partition(":")[0]
    about = "; ".join(finding.messages[:1])
    company = company_of({"company": finding.company})
    return Seed(name, finding.case, about, {device: (finding.backend,)}, finding.symptom, company)
