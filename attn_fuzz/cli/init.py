"""``init``: what a repository needs so that its tests and its CI fuzz a kernel."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from string import Template
from typing import Annotated, Final

import typer

from attn_fuzz import __version__
from attn_fuzz.cli.arguments import DEFAULT_STORE, UsageError
from attn_fuzz.findings.regression_cases import REGRESSIONS

TEST_FILE: Final = Path("tests") / "test_attn_fuzz.py"
WORKFLOW: Final = Path(".github") / "workflows" / "attn-fuzz.yml"
IGNORED: Final = f"/{DEFAULT_STORE.parts[0]}/"

ACTION: Final = f"attn-fuzz/attn-fuzz@v{__version__}"
"""Where the workflow takes the action from; forks and mirrors say theirs with ``--action``."""

RUNNERS: Final = {"cpu": "ubuntu-latest", "cuda": "[self-hosted, gpu]"}
"""Runners of GitHub by device; the labels of those with a GPU are the repository's own to choose."""

_TEST_FILE: Final = Template('''\
"""Fuzzes $kernel; cases that are saved in $regressions are tests, too.

How long is for pytest's command line to say: --attn-seconds (20 by default) or --attn-cases.
"""

import pytest


@pytest.mark.attn_fuzz(kernel="$kernel", device="$device")
def test_$name() -> None:
    """Clean by itself and inside a layer with a K/V buffer."""
''')

_WORKFLOW: Final = Template("""\
name: attn-fuzz
on: [push, pull_request]
permissions:
  contents: read
jobs:
  kernel:
    runs-on: $runner
    timeout-minutes: 30
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      # What the kernel imports, torch among it: a CPU build where there is no GPU. Put your own line here.
      - run: if [ -f requirements.txt ]; then python -m pip install -r requirements.txt; fi
      - uses: $action
        with:
          kernel: "$kernel"
          device: $device
          seconds: "60"
""")


@dataclasses.dataclass(frozen=True)
class Part:
    """A file of a repository as it should be."""

    path: Path
    text: str
    about: str
    added: bool = False
    """Its text goes behind what is there already, which stays."""

    @property
    def in_the_way(self) -> bool:
        """Whether writing it would lose something."""
        return not self.added and self.path.exists()

    def write(self) -> None:
        """Raises UsageError where it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self.added else "w") as file:
                file.write(self.text)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}") from None


def _require_kernel(kernel: str) -> str:
    """The function's name; the module is looked for and not imported, since that may take a GPU.

    Raises:
        UsageError: when the words name no function, or no such file or module is here.
    """
    place, colon, name = kernel.rpartition(":")
    if not colon or not name.isidentifier() or any(sign in place for sign in "\"'\\\n:"):
        raise UsageError(f"{kernel!r} names no function; use MODULE:FUNCTION or PATH.py:FUNCTION")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UsageError(f"there is no file {place} here; run init in the root of its repository")
        if Path(place).is_absolute():
            raise UsageError(f"{place} is a path of this machine alone; name it from the root of its repository")
        return name
    top = place.partition(".")[0]
    sys.path.insert(0, str(Path.cwd()))
    try:
        if not top.isidentifier() or importlib.util.find_spec(top) is None:
            raise UsageError(f"there is no module {top or place!r} here; install it, or name a file: PATH.py:FUNCTION")
    finally:
        sys.path.pop(0)
    return name


def _require_root() -> None:
    """Raises UsageError inside a repository: only in its root GitHub looks for workflows."""
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
    if root != here:
        raise UsageError(f"run init in the root of the repository, {root}")


def _ignore_lines() -> str:
    """What the ignore file lacks."""
    path = Path(".gitignore")
    text = path.read_text() if path.is_file() else ""
    if {IGNORED, IGNORED.strip("/"), IGNORED.lstrip("/"), IGNORED.rstrip("/")} & set(text.split()):
        return ""
    return ("" if not text or text.endswith("\n") else "\n") + f"{IGNORED}\n"


def parts_of(kernel: str, name: str, device: str, action: str) -> list[Part]:
    """What is to be written, in the order in which it is told."""
    words = {"kernel": kernel, "name": name, "device": device, "action": action, "regressions": REGRESSIONS}
    parts = [
        Part(TEST_FILE, _TEST_FILE.substitute(words), f"pytest fuzzes {kernel}"),
        Part(WORKFLOW, _WORKFLOW.substitute(words, runner=RUNNERS[device]), f"each push fuzzes it, by {action}"),
    ]
    if lines := _ignore_lines():
        parts.append(Part(Path(".gitignore"), lines, f"findings, in {DEFAULT_STORE}, stay out of commits", added=True))
    if not REGRESSIONS.is_dir():
        parts.append(Part(REGRESSIONS / ".gitkeep", "", "`attn-fuzz save` keeps cases there, which pytest collects"))
    return parts


def init(
    kernel: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Or PATH.py:FUNCTION: a varlen kernel.")],
    device: Annotated[str, typer.Option(help="cpu or cuda: where tests and the workflow run it.")] = "cpu",
    action: Annotated[str, typer.Option(help="Where the workflow takes the action from: OWNER/NAME@REF.")] = ACTION,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
) -> None:
    """Write a test file, a GitHub workflow and an ignore entry for a kernel into the repository in this folder."""
    if device not in RUNNERS:
        raise UsageError(f"unknown device {device!r}; use cpu or cuda")
    name = _require_kernel(kernel)
    _require_root()
    parts = parts_of(kernel, name, device, action)
    if (there := [str(part.path) for part in parts if part.in_the_way]) and not force:
        raise UsageError(f"{' and '.join(there)} exist already; nothing was written: move them, or say --force")
    for part in parts:
        if not dry_run:
            part.write()
        done = ("would add to" if dry_run else "added to") if part.added else "would write" if dry_run else "wrote"
        typer.echo(f"{done} {part.path}: {part.about}")
    if not dry_run:
        typer.echo(f"next: python -m pytest {TEST_FILE}")
