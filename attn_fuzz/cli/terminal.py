"""What people see: results on standard output, progress of a campaign on standard error."""

from __future__ import annotations

import os
import sys
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.findings.finding import Finding

progress_console = Console(stderr=True, emoji=False)

_FILE_WIDTH: Final = 160
"""Columns of a table that goes to a file or a log, which has no width of its own."""


def results_console() -> Console:
    """Standard output, as it is now."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(emoji=False, width=None if wide else _FILE_WIDTH)


ROOMY: Final = 110
"""Columns from which on the line of a backend has documents, too."""

_DESCRIPTION: Final = 28
"""Columns of a backend's name in its line: the longest of ours have 22, and of a path its end is shown."""


def short(name: str) -> str:
    """The end of a name that has no room in a line: without its folders."""
    return name if len(name) <= _DESCRIPTION else name.rpartition("/")[2]


class Screen:
    """Progress on standard error: one line per backend at work, none once it has ended.

    Args:
        names: backends.
        seconds: how long each is fuzzed, or None.
        cases: how often, instead.
        console: where to.
    """

    def __init__(
        self, names: tuple[str, ...], seconds: float | None, cases: int | None, console: Console = progress_console
    ) -> None:
        fields = ("cases", "documents", "findings") if console.width >= ROOMY else ("cases", "findings")
        counts = ", ".join(f"{{task.fields[{field}]}} {field}" for field in fields)
        line = Column(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=line),
            BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
            TextColumn(counts, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            console=console,
            # What the lines said, the table at the end says: they would stand above it as if something still ran.
            transient=True,
            expand=True,
        )
        self._by_cases = cases is not None
        total = float(cases) if cases is not None else seconds
        self._tasks = {
            name: self._progress.add_task(short(name), total=total, cases=0, documents=0, findings=0) for name in names
        }
        self._found: dict[str, set[str]] = {name: set() for name in names}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, tallies: dict[str, Tally]) -> None:
        """Shows what has been done so far."""
        for name, tally in tallies.items():
            done = float(tally.cases) if self._by_cases else tally.seconds
            self._progress.update(self._tasks[name], completed=done, cases=tally.cases, documents=tally.documents)

    def refresh(self) -> None:
        """Draws now what is otherwise drawn ten times a second."""
        self._progress.refresh()

    def ended(self, name: str) -> None:
        """Takes the line of a backend away."""
        self._progress.update(self._tasks[name], visible=False)

    def found(self, finding: Finding) -> None:
        """Counts a finding, unless it is a smaller one in the place of another, and prints it above the lines."""
        self._found[finding.backend].add(finding.symptom)
        self._progress.update(self._tasks[finding.backend], findings=len(self._found[finding.backend]))
        self._progress.console.print(
            f"{finding.symptom} on {finding.backend}: {finding.case.in_short()}", markup=False, soft_wrap=True
        )
