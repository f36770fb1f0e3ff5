"""Where a named case comes from: a JSON file, a stored finding, or a regression case."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from attn_fuzz.backends.registry import found_from, users
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store, is_file
from attn_fuzz.reduction.call_sequence import CallSequence, call_sequence_of
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.case_format import FORMAT, NewerVersion, require_format

REGRESSIONS = Path("tests") / "regressions"
"""Regression cases of the project in whose folder the command runs."""


@dataclasses.dataclass(frozen=True)
class RegressionCase:
    """A saved case; optionally why it is kept, and what failed it and how, which must pass once that is mended."""

    name: str
    case: Case
    about: str = ""
    expected_failures: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Known-bad controls, which must fail it for ever, by ``cpu`` and ``cuda``."""
    symptom: str = ""
    """How it fails, by the symptom's name; empty where that is not known."""
    backend: str = ""
    """What it was found on: it must be clean there."""
    device: str = ""
    """Where that was."""
    sequence: CallSequence | None = None
    """Calls in a row, where the case fails among them only."""
    root: Path | None = None
    """Of a user's kernel: the folder that it was named in, absolute; None where that is not known, or no matter."""

    @property
    def failing(self) -> dict[str, tuple[str, ...]]:
        """Backends that fail it, or did, by ``cpu`` and ``cuda``."""
        found = {kind: tuple(names) for kind, names in self.expected_failures.items()}
        if self.backend:
            kind = self.device.partition(":")[0]
            found[kind] = tuple(dict.fromkeys((self.backend, *found.get(kind, ()))))
        return found

    def from_anywhere(self, root: Path | None = None) -> RegressionCase:
        """The same with backends by names that are found in whatever folder this process is in.

        Args:
            root: the folder that they were named in; None for that which the case says, else this one.
        """
        folder = (root or self.root or Path.cwd()).resolve()
        named = {
            kind: tuple(found_from(name, folder) for name in names) for kind, names in self.expected_failures.items()
        }
        backend = found_from(self.backend, folder) if self.backend else ""
        return dataclasses.replace(self, backend=backend, expected_failures=named)

    def to_json(self, folder: Path | None = None) -> str:
        """The content of its file: one line per entry.

        Args:
            folder: the one that the file is to lie in.
        """
        entries: dict[str, Any] = {"format": FORMAT, "about": self.about, "case": self.case.to_dict()}
        if self.sequence is not None:
            entries["sequence"] = self.sequence.to_dict()
        if self.expected_failures:
            entries["expected_failures"] = {device: list(names) for device, names in self.expected_failures.items()}
        entries |= {key: value for key in ("backend", "device", "symptom") if (value := getattr(self, key))}
        if folder is not None and users(self.backend) is not None:
            entries["root"] = os.path.relpath(self.root or Path.cwd(), folder)
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        return f"{{\n{lines}\n}}\n"


def read_regression_case(path: Path) -> RegressionCase:
    """A case from a file: a bare case, a regression case, or a stored finding.

    Raises:
        CaseError: when the file cannot be read or holds no possible case.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise CaseError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise CaseError(f"{path} is not valid JSON: it is no text in UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise CaseError(f"{path} is not valid JSON: {error}") from None
    try:
        if isinstance(data, Mapping) and "case" in data:
            _require_known(data)
            words = {key: str(data.get(key, "")) for key in ("about", "symptom", "backend", "device")}
            # Version 0.1 called it company.
            case, sequence = Case.from_dict(data["case"]), call_sequence_of({"sequence": data.get("company"), **data})
            root = (path.parent / str(data["root"])).resolve() if data.get("root") else None
            return RegressionCase(
                path.stem, case, expected_failures=_expected_failures(data), sequence=sequence, root=root, **words
            )
        return RegressionCase(path.stem, Case.from_dict(data))
    except CaseError as error:
        raise CaseError(f"{path}: {error}") from None


_OLDER: Final = ("format", "case", "company", "convicts")
"""Keys of files that are no fields; the last two are version 0.1's names of ``sequence`` and ``expected_failures``."""


def _require_known(data: Mapping[str, Any]) -> None:
    """Raises NewerVersion where a key or the format is one that only newer versions have."""
    require_format(data, "it")
    known = {*_OLDER, "id", *(field.name for kind in (RegressionCase, Finding) for field in dataclasses.fields(kind))}
    if unknown := sorted(str(key) for key in data if key not in known):
        raise NewerVersion(f"it was written by a newer version (it has {unknown[0]!r}); upgrade attn-fuzz")


def _expected_failures(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The known-bad controls."""
    expected_failures = data.get("expected_failures", data.get("convicts", {}))
    if not isinstance(expected_failures, Mapping) or not all(
        isinstance(names, list) for names in expected_failures.values()
    ):
        raise CaseError('expected_failures must name backends by device, as in {"cpu": ["legacy:loop"]}')
    return {str(device): tuple(map(str, names)) for device, names in expected_failures.items()}


def regression_cases(folder: Path = REGRESSIONS) -> tuple[RegressionCase, ...]:
    """All regression cases, by name."""
    return tuple(read_regression_case(path) for path in sorted(folder.glob("*.json")))


def find_regression_case(name: str, store: Path) -> RegressionCase:
    """A case by path, by regression name, by finding id, or as JSON text.

    Raises:
        CaseError: for an unreadable file or impossible case.
        StoreError: when nothing of that name is found.
    """
    if name.lstrip().startswith("{"):
        return RegressionCase("case", Case.from_json(name))
    path = Path(name)
    if path.suffix == ".json" or is_file(path):
        return read_regression_case(path)
    if is_file(REGRESSIONS / f"{name}.json"):
        return read_regression_case(REGRESSIONS / f"{name}.json")
    finding = Store(store).load(name)
    return RegressionCase(
        name,
        finding.case,
        "; ".join(finding.messages[:1]),
        symptom=finding.symptom,
        backend=finding.backend,
        device=finding.device,
        sequence=call_sequence_of({"sequence": finding.sequence}),
        root=Store(store).root(finding),
    )
