"""A finding: a case, a backend, and the checks it failed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Final

from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.case_format import FORMAT, NewerVersion, require_format


class FindingError(ValueError):
    """A stored finding that cannot be read; the message is one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What is reported, stored and replayed."""

    backend: str
    device: str
    symptom: str
    """Name of the symptom's type."""
    checks: tuple[str, ...]
    messages: tuple[str, ...]
    """One sentence per symptom."""
    case: Case
    """Shrunk."""
    original_case: Case
    cases_to_find: int
    seconds_to_find: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sequence: Mapping[str, Any] | None = None
    """Calls in a row (``reduction.call_sequence.CallSequence.to_dict``) where the case fails among them only."""
    root: str = ""
    """Of a user's kernel: the folder that it was named in, from that of the finding's file; empty where that is no
    matter."""

    symptoms: tuple[Mapping[str, Any], ...] = ()
    """What the first sentences are about, as data (``oracle.symptoms.Symptom.to_dict``): check, tensor, document, row,
    head, channel, what came and what should have, z; of those, what is known."""
    same_as: str = ""
    """The id of an earlier finding that is taken for the same bug (``findings.same``); empty where there is none."""

    @property
    def id(self) -> str:
        """Ten hexadecimal digits of backend, symptom and shrunk case."""
        text = f"{self.backend}\n{self.symptom}\n{self.case.to_json()}"
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format": FORMAT,
            "id": self.id,
            **fields,
            "checks": list(self.checks),
            "messages": list(self.messages),
            "symptoms": [dict(symptom) for symptom in self.symptoms],
            "case": self.case.to_dict(),
            "original_case": self.original_case.to_dict(),
            "environment": dict(self.environment),
            "sequence": None if self.sequence is None else dict(self.sequence),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Finding:
        """The inverse of ``to_dict``.

        Raises:
            FindingError: for anything else.
            NewerVersion: when it was written by a newer version.
            CaseError: when one of its cases is impossible.
        """
        if not isinstance(data, Mapping):
            raise FindingError(f"this is no finding: it is a {type(data).__name__}, and no JSON object")
        _require_known(data)
        try:
            return cls(
                backend=_word(data["backend"]),
                device=_word(data["device"]),
                symptom=_word(data["symptom"]),
                checks=_words(data["checks"]),
                messages=_words(data["messages"]),
                case=Case.from_dict(data["case"]),
                original_case=Case.from_dict(data["original_case"]),
                cases_to_find=int(data["cases_to_find"]),
                seconds_to_find=float(data["seconds_to_find"]),
                environment={_word(name): _word(said) for name, said in dict(data.get("environment", {})).items()},
                sequence=_calls(data),
                root=_word(data.get("root", "")),
                symptoms=tuple(dict(symptom) for symptom in data.get("symptoms", ())),
                same_as=_word(data.get("same_as", "")),
            )
        except CaseError:
            raise
        except KeyError as missing:
            raise FindingError(f"this is no finding: it has no {missing}") from None
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FindingError(f"this is no finding: {type(error).__name__} {error}") from None


_OLDER: Final = ("id", "format", "company")
"""Keys of files that are no fields; the last is version 0.1's name of ``sequence``."""


def _require_known(data: Mapping[str, Any]) -> None:
    """Raises NewerVersion where a key or the format of a finding is one that only newer versions have."""
    require_format(data, "the finding")
    known = {*_OLDER, *(field.name for field in dataclasses.fields(Finding))}
    unknown = sorted(str(key) for key in data if key not in known)
    # Of what is no finding at all another sentence says so.
    if unknown and {"backend", "case", "symptom"} <= set(data):
        raise NewerVersion(f"the finding was written by a newer version (it has {unknown[0]!r}); upgrade attn-fuzz")


def _calls(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Calls in a row; findings of version 0.1 have them as ``company``."""
    found = data.get("sequence", data.get("company"))
    return None if found is None else dict(found)


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{value!r} is no list of words")
    return tuple(value)


def summarise(verdict: Verdict) -> dict[str, Any]:
    """Checks, messages and symptoms of a finding, from a verdict that has some."""
    some = verdict.symptoms[:12]
    return {
        "checks": verdict.checks,
        "messages": tuple(str(symptom) for symptom in some),
        "symptoms": tuple(symptom.to_dict() for symptom in some),
    }
