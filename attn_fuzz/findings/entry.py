"""An entry of the ledger: one bug, what has become of it, where it was seen, and on what it is wrong and right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

from attn_fuzz.findings.signature import Signature
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.case_format import NewerVersion

STATES: Final = ("new", "reduced", "reported", "confirmed", "fix pending", "fixed", "not a bug", "duplicate")
FOUND_BY: Final = ("campaign unaided", "probe", "published report tried", "person", "not recorded")
ANSWERS: Final = ("wrong", "right", "refused", "not run")
FORMAT: Final = 1
"""Of an entry's file."""


class LedgerError(ValueError):
    """The ledger cannot be read, written or edited so; one sentence says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of an entry on one device with one set of versions."""

    answer: str
    """One of ``ANSWERS``."""
    why: str = ""
    """In a sentence: what is wrong, or why it was refused or not run."""
    script: str = ""
    """What its script said, where there is one."""
    date: str = ""


Matrix = Mapping[str, Mapping[str, Answer]]
"""By versions, then by device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One bug."""

    id: str
    """Of its signature; of a known issue its name."""
    signature: Signature
    device: str
    """Where it was found, ``cpu`` or ``cuda``."""
    case: Case
    """The smallest that shows it."""
    sequence: Mapping[str, Any] | None = None
    """Calls in a row, where the case fails among them only."""
    root: str = ""
    """Of a user's backend: the folder that it was named in, from the store."""
    about: str = ""
    """What happens, in a sentence."""
    kind: str = "finding"
    """``finding``, ``known issue`` or ``declared limit``."""
    state: str = "new"
    version: str = ""
    """Where it is ``fixed``: in which version."""
    same_as: str = ""
    """Where it is a ``duplicate``: of which entry."""
    found_by: str = "campaign unaided"
    link: str = ""
    """Where it is reported."""
    notes: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    """Every time it was found, in words that tell them apart."""
    matrix: Matrix = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (("state", self.state, STATES), ("found_by", self.found_by, FOUND_BY)):
            if value not in known:
                raise LedgerError(f"unknown {name.replace('_', ' ')} {value!r}; use {', '.join(known)}")
        if (self.state == "fixed") != bool(self.version):
            raise LedgerError("what is fixed is so in a version: say --state fixed --version VERSION")
        if (self.state == "duplicate") != bool(self.same_as):
            raise LedgerError("a duplicate is one of another entry: say --state duplicate --same-as ID")

    @property
    def state_in_words(self) -> str:
        """The state, with what belongs to it."""
        return " ".join(part for part in (self.state, self.version and f"in {self.version}", self.same_as) if part)

    def to_json(self) -> str:
        """The content of its file: an entry of a list a line, so that a review and a merge see what is new."""
        data = {
            "format": FORMAT,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "signature": self.signature.to_dict(),
            "case": self.case.to_dict(),
            "sequence": None if self.sequence is None else dict(self.sequence),
            "matrix": {
                versions: {device: dataclasses.asdict(answer) for device, answer in sorted(devices.items())}
                for versions, devices in sorted(self.matrix.items())
            },
        }
        wide = {"case", "sequence"}
        parts = [f'  "{key}": {json.dumps(value, indent=None if key in wide else 2)}' for key, value in data.items()]
        # What is nested stands two further to the right.
        return "{\n" + ",\n".join(part.replace("\n", "\n  ") for part in parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """The inverse of ``to_json``.

        Raises:
            NewerVersion: when a newer version has written it.
            LedgerError: for anything else.
        """
        try:
            data = json.loads(text)
            if int(data.get("format", 1)) > FORMAT:
                raise NewerVersion(f"it was written by a newer version (format {data['format']}); upgrade attn-fuzz")
            fields = {field.name for field in dataclasses.fields(cls)}
            if unknown := sorted(set(data) - fields - {"format"}):
                raise NewerVersion(f"it was written by a newer version (it has {unknown[0]!r}); upgrade attn-fuzz")
            matrix = {
                str(versions): {str(device): Answer(**answer) for device, answer in devices.items()}
                for versions, devices in data["matrix"].items()
            }
            words = {field.name for field in dataclasses.fields(cls) if field.type == "str"}
            if odd := sorted(name for name in words & set(data) if not isinstance(data[name], str)):
                raise LedgerError(f"this is no entry of a ledger: its {odd[0]} is no text")
            lists = {name: tuple(data[name]) for name in ("notes", "seen")}
            if odd := sorted(name for name in lists if not _is_list_of_texts(data[name])):
                raise LedgerError(f"this is no entry of a ledger: its {odd[0]} are no list of texts")
            given = {name: data[name] for name in data if name in fields}
            made = {"signature": Signature.from_dict(data["signature"]), "case": Case.from_dict(data["case"])}
            return cls(**{**given, **lists, **made, "matrix": matrix})
        except (NewerVersion, LedgerError):
            raise
        except (CaseError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LedgerError(f"this is no entry of a ledger: {type(error).__name__} {error}") from None


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def merged(mine: Entry, other: Entry) -> Entry:
    """One entry of two of the same bug: what either has seen, and the state of the one that has got further."""
    further = max((mine, other), key=lambda entry: STATES.index(entry.state))
    matrix = {versions: dict(devices) for versions, devices in mine.matrix.items()}
    for versions, devices in other.matrix.items():
        for device, answer in devices.items():
            before = matrix.setdefault(versions, {}).get(device)
            if before is None or before.date < answer.date:
                matrix[versions][device] = answer
    return dataclasses.replace(
        further,
        link=mine.link or other.link,
        notes=tuple(dict.fromkeys((*mine.notes, *other.notes))),
        seen=tuple(sorted({*mine.seen, *other.seen})),
        matrix=matrix,
    )
