"""The house has three floors and imports only go down."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
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


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import one another in a circle, by type or in functions too; none for a house in order.

    Args:
        sources: texts by module name.
    """
    graph = {name: {other for other in imported(text) if other in sources} - {name} for name, text in sources.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for _, path in modules()}
    sources = {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}
    assert circle(sources) == []


def test_circles_are_seen() -> None:
    sources = {"a.x": "from a import y", "a.y": "def f():\n    import a.z", "a.z": "from a.x import thing", "b": ""}
    assert set(circle(sources)) == {"a.x", "a.y", "a.z"}
    assert circle({"a.x": "import a.y", "a.y": "import b", "b": ""}) == []


def test_every_module_is_small_and_says_what_it_is() -> None:
    for _, path in modules():
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        assert ast.get_docstring(ast.parse(text)), path
        assert "utils" not in path.stem, path
