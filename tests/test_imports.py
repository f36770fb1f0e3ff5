"""The house has floors and rooms, and imports only go down."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "attn_fuzz"
FLOORS = ("reference", "backends")
"""Folders beside the package that are imported as parts of it."""
ROOMS = (
    "reference",
    "backends",
    "adapters",
    "cases",
    "generation",
    "execution",
    "ranks",
    "oracle",
    "batch",
    "coverage",
    "reduction",
    "findings",
    "campaign",
    "evaluation",
    "nights",
    "reports",
    "cli",
)
"""From the ground up (docs/architecture.md): a room imports from those before it."""
WORDS = ("case", "conventions", "layout", "memory", "profile", "weights")
"""Modules of ``reference`` that say what a case is, and so all that backends may import: never what its answer is."""
NOT_INSTALLED = ("results", "upstream")
"""Folders of what only maintainers run, which may import anything; nothing imports them."""


@functools.cache
def imported(source: str) -> frozenset[str]:
    """Every module that a source text imports, ``from package import module`` spelled out."""
    return frozenset(_imported(ast.parse(source)))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    """The name that a file of the tree is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in FLOORS:
        parts = (PACKAGE, *parts)
    return ".".join(parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The room that a module lies in; None for the package's own front door."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if package == PACKAGE and room in ROOMS else None


def violations(module: str, source: str) -> list[str]:
    """Imports of a module that go up, from a backend to an answer, or to a name that only a bare checkout has."""
    names = imported(source)
    wrong = [name for name in names if name.partition(".")[0] in (*FLOORS, *NOT_INSTALLED)]
    if (room := room_of(module)) is not None:
        above = ROOMS[ROOMS.index(room) + 1 :]
        wrong += [name for name in names if room_of(name) in above]
    if room == "backends":
        allowed = {f"{PACKAGE}.reference.{word}" for word in WORDS}
        asked = (name for name in names if room_of(name) == "reference" and name != f"{PACKAGE}.reference")
        wrong += [name for name in asked if ".".join(name.split(".")[:3]) not in allowed]
    return sorted(wrong)


def modules() -> list[tuple[str, Path]]:
    folders = (PACKAGE, *FLOORS)
    return [(name_of(path), path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_imports_go_down() -> None:
    found = {module: violations(module, path.read_text()) for module, path in modules()}
    assert {module: wrong for module, wrong in found.items() if wrong} == {}


def test_every_module_is_in_a_room() -> None:
    outside = {module for module, _ in modules() if room_of(module) is None}
    assert outside == {PACKAGE, *(f"{PACKAGE}.{front}" for front in ("__main__", "api", "pytest_plugin"))}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attn_fuzz.reference.case", "import attn_fuzz.backends.kernel"),
        ("attn_fuzz.reference.case", "from attn_fuzz import cli"),
        ("attn_fuzz.reference.case", "from attn_fuzz.cli import app"),
        ("attn_fuzz.backends.loop", "from attn_fuzz.oracle.trial import Trial"),
        ("attn_fuzz.backends.loop", "from attn_fuzz.reference import budget"),
        ("attn_fuzz.backends.loop", "from attn_fuzz.reference.batched import kernel_answer"),
        ("attn_fuzz.backends.kernels.loop", "def f():\n    from attn_fuzz.reference.layer import layer_answer"),
        ("attn_fuzz.generation.strategies", "from attn_fuzz.oracle.symptoms import Symptom"),
        ("attn_fuzz.oracle.examine", "import attn_fuzz.campaign.worker"),
        ("attn_fuzz.cli.app", "from reference.case import Case"),
        ("attn_fuzz.cli.app", "import backends.registry"),
        ("attn_fuzz.cli.app", "from results.render.tables import ROOT"),
    ],
)
def test_rule_sees_violations(module: str, source: str) -> None:
    assert violations(module, source)


def test_rule_lets_the_rest_through() -> None:
    assert violations("attn_fuzz.backends.loop", "from attn_fuzz.reference.case import Case\nimport torch") == []
    assert (
        violations("attn_fuzz.cli.app", "from attn_fuzz.reference.vectorised import x\nfrom attn_fuzz import cli") == []
    )


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
    # The package itself is imported by every one of its modules, and by a few by name.
    sources = {name: path.read_text() for name, path in modules() if name != PACKAGE}
    assert circle(sources) == []


def test_circles_are_seen() -> None:
    sources = {"a.x": "from a import y", "a.y": "def f():\n    import a.z", "a.z": "from a.x import thing", "b": ""}
    assert set(circle(sources)) == {"a.x", "a.y", "a.z"}
    assert circle({"a.x": "import a.y", "a.y": "import b", "b": ""}) == []


def test_every_module_is_small_and_says_what_it_is() -> None:
    for _, path in modules():
        text = path.read_text()
        assert len(text.splitlines()) <= 360, path
        assert text.startswith('"""'), path
        assert "utils" not in path.stem, path


def test_the_project_outside_the_package_has_one_name_for_everything_too() -> None:
    """A module that is imported under two names exists twice, and so do its classes."""
    for folder in ("tests", "examples", *NOT_INSTALLED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = imported(path.read_text())
            assert not {name for name in names if name.partition(".")[0] in FLOORS}, path
