"""What a bug is known by: the same in every campaign and store, whatever sizes it was shrunk to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.same import needs, tensor_of

_SILENT: Final[Mapping[str, object]] = {"dtype": "fp32", "memory": "contiguous", "causal": True}
"""What shrinking leaves where the bug does not need anything else, and so is not said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """Backend, symptom, tensor, how far the wrong elements reach, and what the minimal case needs."""

    backend: str
    symptom: str
    tensor: str
    """Empty where the finding does not say."""
    failing: tuple[str, ...]
    """Such as ``all rows``; what was not looked at is left out."""
    axes: tuple[str, ...]
    """Of the minimal case, such as ``past`` and ``dtype bf16``: no sizes, no seeds, no levels."""

    @classmethod
    def of(cls, finding: Finding) -> Signature:
        """That of a finding."""
        first: Mapping[str, Any] = finding.symptoms[0] if finding.symptoms else {}
        failing = first.get("failing", {})
        reached = _reached(failing) if isinstance(failing, Mapping) else []
        nan = ["NaN"] if first.get("got") == "nan" else []
        axes = [_words(name, value) for name, value in needs(finding.case).items() if value != _SILENT.get(name, False)]
        axes += ["other calls"] if finding.sequence is not None else []
        return cls(
            backend=finding.backend,
            symptom=finding.symptom,
            tensor=tensor_of(finding),
            failing=(*reached, *nan),
            axes=tuple(axes),
        )

    @property
    def id(self) -> str:
        """Ten hexadecimal digits of all of it."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "failing": list(self.failing), "axes": list(self.axes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Signature:
        """The inverse of ``to_dict``. Raises KeyError and TypeError for anything else."""
        words = {name: str(data[name]) for name in ("backend", "symptom", "tensor")}
        return cls(**words, failing=tuple(map(str, data["failing"])), axes=tuple(map(str, data["axes"])))

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.tensor, *self.failing) if part)
        needed = f"; needs {', '.join(self.axes)}" if self.axes else ""
        return f"{self.symptom} on {self.backend}: {where or 'nowhere in particular'}{needed}"


def _reached(failing: Mapping[str, str]) -> list[str]:
    """How far wrong elements reach, in words: ``one row``, ``some channels``; what is wrong as a whole is not said."""
    if failing and set(failing.values()) == {"all"}:
        return ["everything"]
    parts = [(word, what) for what, word in failing.items() if word != "all"]
    return [f"one {what.removesuffix('s')}" if word == "one" else f"{word} {what}" for word, what in parts]


def _words(name: str, value: object) -> str:
    """An axis and what it is, where it is not a matter of yes."""
    if value is True:
        return name
    return f"not {name}" if value is False else f"{name} {value}"
