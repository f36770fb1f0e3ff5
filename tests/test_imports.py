"""The house has three floors and imports only go down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("reference", "backends", "attn_fuzz")
ANSWERS = ("answer", "attention", "arithmetic", "budget", "layer", "simulated")
"""Modules of ``reference`` that know what is right; backends must not ask them."""


def imported(source: str) -> Iterator[str]:
    """Every module that a source text imports, ``from package import module`` spelled out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(floor: str, source: str) -> list[str]:
    """Imports of a module on ``floor`` that go up, or from a backend to an answer."""
    above = FLOORS[FLOORS.index(floor) + 1 :]
    wrong = [name for name in imported(source) if name.partition(".")[0] in above]
    if floor == "backends":
        answers = {f"reference.{module}" for module in ANSWERS}
        wrong += [name for name in imported(source) if name in answers]
    return wrong


def modules() -> list[tuple[str, Path]]:
    return [(floor, path) for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


@pytest.mark.parametrize(("floor", "path"), modules(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_go_down(floor: str, path: Path) -> None:
    assert violations(floor, path.read_text()) == []


@pytest.mark.parametrize(
    ("floor", "source"),
    [
        ("reference", "import backends.kernel"),
        ("reference", "from attn_fuzz import cli"),
        ("backends", "from attn_fuzz.trial import Trial"),
        ("backends", "from reference import budget"),
        ("backends", "def f():\n    from reference.layer import layer_answer"),
    ],
)
def test_rule_sees_violations(floor: str, source: str) -> None:
    assert violations(floor, source)


def test_every_module_is_small_and_says_what_it_is() -> None:
    for _, path in modules():
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        assert ast.get_docstring(ast.parse(text)), path
        assert "utils" not in path.stem, path
