"""What people see of a campaign while it goes on: a line for each backend, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.cli.terminal import progress_console, short
from attn_fuzz.findings.finding import Finding
from attn_fuzz.nights.view import View

_PER_SECOND = 2.0


def count(number: int) -> str:
    """A number in at most five characters."""
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M"), (10_000, "k")):
        if number >= size:
            scaled = number / (1000 if letter == "k" else size)
            return f"{scaled:.0f}{letter}" if scaled >= 100 else f"{scaled:.1f}{letter}"
    return str(number)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = max(round(seconds), 0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}"


def _worst(tally: Tally) -> str:
    return f"{max(tally.worst_z.values()):.1f}" if tally.worst_z else "-"


class NightScreen:
    """A table that is drawn anew about once a second; each new finding stands above it.

    Args:
        coverage: the share of values and pairs that a backend has reached on a kind of device, from 0 to 1.
        console: where to.
    """

    def __init__(self, coverage: Callable[[tuple[str, str]], float], console: Console = progress_console) -> None:
        self._coverage, self._console = coverage, console
        self._live = Live(console=console, transient=True, refresh_per_second=_PER_SECOND)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, view: View, finding: Finding | None) -> None:
        """Shows what was done so far, and a finding that is new."""
        if finding is not None:
            self._console.print(
                f"{finding.symptom} on {finding.backend}: {finding.case.in_short()}", markup=False, soft_wrap=True
            )
        self._live.update(self.drawn(view))

    def drawn(self, view: View) -> Group:
        """The table, and a line above it."""
        now = time.monotonic()
        left = "until it is told to end" if view.ends is None else f"{duration(view.ends - now)} left"
        alive = view.alive.total()
        workers = f"{alive} worker{'s' * (alive != 1)}"
        head = f"{duration(now - view.begun)}, {left}, {workers}, round {view.rounds + 1}"
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("backend", no_wrap=True, overflow="ellipsis", max_width=28)
        for name in ("cases", "docs", "finds", "known", "max z", "cover", "busy"):
            table.add_column(name, justify="right", no_wrap=True, min_width=5)
        tallies = view.tallies()
        several = len({kind for _, kind in tallies}) > 1
        # Compiling ones by themselves, behind the others.
        for subject in sorted(tallies, key=lambda each: (each[0] in view.compiled, each)):
            tally = tallies[subject]
            name = short(subject[0]) + (f" {subject[1]}" if several else "") + " *" * (subject[0] in view.compiled)
            table.add_row(
                Text(name),
                *(count(number) for number in (tally.cases, tally.documents, view.findings.get(subject, 0))),
                count(sum(tally.known.values())),
                _worst(tally),
                f"{self._coverage(subject):.0%}",
                str(view.alive[subject] or ""),
            )
        note = [Text("* compiles for what it is handed, and is compared with such alone")] if view.compiled else []
        return Group(Text(head), table, *note)
