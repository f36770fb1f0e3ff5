"""``--set NAME=VALUE``: arguments of a user's class, as numbers, booleans, strings or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer

from attn_fuzz.backends.layer_arguments import named, taken_apart
from attn_fuzz.cli.arguments import UsageError

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An argument of the class, given by name beside weights and case: JSON, or else a string; repeat for "
        "several. Findings keep it.",
    ),
]

_PYTHON: Final = {"True": True, "False": False, "None": None}
"""Words that JSON spells otherwise: as strings, all of them would be true."""


def _value(name: str, text: str) -> Any:
    """What stands behind the sign, as JSON has it where it is any, else as it is."""
    if text in _PYTHON:
        return _PYTHON[text]

    def refuse(constant: str) -> float:
        raise UsageError(f"--set {name}={constant}: {constant} is no number that JSON knows")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError):
        return text


def arguments_of(given: Sequence[str]) -> dict[str, Any]:
    """Arguments by name.

    Raises:
        UsageError: where one has no name or no value, or is given twice.
    """
    found: dict[str, Any] = {}
    for each in given:
        name, sign, text = each.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(f"--set {each} sets nothing; use --set NAME=VALUE, NAME being an argument of the class")
        if name in found:
            raise UsageError(f"--set {name} is given twice; a class takes each argument once")
        found[name] = _value(name, text)
    return found


def with_arguments(name: str, given: Sequence[str] | None) -> str:
    """The name of a user's class with what is set; it may have arguments already, of which those are replaced.

    Raises:
        UsageError: as ``arguments_of`` does.
    """
    bare, before = taken_apart(name)
    return named(bare, before | arguments_of(given or ()))
