"""What every script is filled in with: its head, its numbers, what attention was asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.templates import templates
from attn_fuzz.reference.case import Case

MAX_ELEMENTS: Final = 20000
"""Numbers that a person still wants in a report."""

SECONDS: Final = {"cpu": 60, "cuda": 300}
"""After which a call that is silent counts as one that never comes back; on a GPU something may be compiled first."""

_DTYPES: Final = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


class ScriptError(ValueError):
    """The finding cannot be told as a script of its own; one sentence says why."""


@dataclasses.dataclass(frozen=True)
class About:
    """The head of a script."""

    title: str
    """What is wrong, in a line."""
    told: str
    """The case."""
    versions: str
    """On what it was seen."""

    @classmethod
    def of(cls, title: str, case: Case, device: str) -> About:
        """The head of a script that is made here."""
        seen = environment(device)
        versions = ", ".join(f"{key} {value}" for key, value in seen.items() if key not in ("commit", "hypothesis"))
        # Inside a docstring.
        plain = title.replace('"""', "'''").replace("\\", "/")
        return cls(" ".join(plain.split()), f"Case: {case.to_json()}", versions)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What attention was asked for, as source text where it is text."""

    device: str
    dtype: str
    scale: float
    softcap: float
    causal: bool
    window: tuple[int, int]

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Asked:
        """Of a case."""
        dtype = _DTYPES[case.dtype]
        return cls(device.type, dtype, case.softmax_scale, case.softcap, case.causal, case.window)


_LONG: Final = 1000
"""Entries of a list that is looked through for a part that it repeats."""

_PERIODS: Final = 512
"""Entries of such a part."""


def listed(entries: Sequence[object]) -> str:
    """A list as source text; a long one that repeats a part of it all along as that part, so many times."""
    words = list(map(str, entries))
    for period in range(1, _PERIODS + 1) if len(words) > _LONG else ():
        times, rest = divmod(len(words), period)
        if not rest and words[:-period] == words[period:]:
            return f"[{', '.join(words[:period])}] * {times}"
    return f"[{', '.join(words)}]"


def numbers(x: torch.Tensor, digits: int = 9) -> str:
    """A tensor's values in order, as source text: nine digits tell every float32 apart."""
    return listed([f"{value:.{digits}g}" for value in x.detach().double().flatten().tolist()])


def allowances(x: torch.Tensor) -> str:
    """Of errors that are allowed three digits are enough, and can be read."""
    return numbers(x, 3)


def source(value: object) -> str:
    """A value as source text, strings in the quotes that formatters give them."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def filled(template: str, values: Mapping[str, Any]) -> str:
    """The text of a script.

    Args:
        template: its file's name, without ``.jinja``.
        values: by the names that the template has.
    """
    text = templates(__file__, autoescape=False).get_template(f"{template}.jinja").render(**values)
    # Parts that were left out have left their blank lines.
    lines: list[str] = []
    for line in text.strip().splitlines():
        if line.strip() or lines[-2:] != ["", ""]:
            lines.append(line.rstrip())
    return "\n".join(lines) + "\n"
