"""What people see: results on standard output, progress of a campaign on standard error."""

from __future__ import annotations

import os
import sys
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.findings.finding import Finding

progress_console = Console(stderr=True, emoji=False)

_FILE_WIDTH: Final = 160
"""Columns of a table that goes to a file or a log, which has no width of its own."""


def results_console() -> Console:
    """Standard output, as it is now."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(emoji=False, width=None if wide else _FILE_WIDTH)


class Screen:
    """Progress on standard error, one line per backend."""

    def __init__(self, names: tuple[str, ...], seconds: float | None, cases: int | None) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.fields[cases]} cases, {task.fields[documents]} documents, {task.fields[found]} findings"),
            TimeElapsedColumn(),
            console=progress_console,
        )
        self._by_cases = cases is not None
        total = float(cases) if cases is not None else seconds
        self._tasks = {
            name: self._progress.add_task(name, total=total, cases=0, documents=0, found=0) for name in names
        }
        self._found = dict.fromkeys(names, 0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, tallies: dict[str, Tally]) -> None:
        for name, tally in tallies.items():
            done = float(tally.cases) if self._by_cases else tally.seconds
            self._progress.update(
                self._tasks[name],
                completed=done,
                cases=tally.cases,
                documents=tally.documents,
                found=self._found[name],
            )

    def found(self, finding: Finding) -> None:
        self._found[finding.backend] += 1
        self._progress.console.print(
            f"{finding.symptom} on {finding.backend}: {finding.case.to_json()}", markup=False, soft_wrap=True
        )
