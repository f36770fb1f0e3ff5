"""Tables as wide as the terminal: words stay whole, and where there is no room for all columns some are left out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

BORDER: Final = 3
"""Characters that a column takes besides its text: a space on either side, and a line; one more line ends the table."""


@dataclasses.dataclass(frozen=True)
class Column:
    """What a column is headed by, and how it is set."""

    head: str
    right: bool = False
    """Numbers, one below the other."""
    spare: bool = False
    """What is left out first where there is no room, the last of them first."""
    name: bool = False
    """Of a backend or kernel: a path may be longer than there is room, and is then broken behind its separators."""


NAME_SHARE: Final = 3
"""A name takes at most one part in so many of the width, if it can be broken."""


def broken_behind(name: str, width: int) -> str:
    """A name in lines of at most so many characters, broken behind ``/`` and ``:`` alone."""
    lines = [""]
    for part in re.findall(r"[^/:]*[/:]|[^/:]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _longest_word(texts: Sequence[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=0)


def _longest_line(texts: Sequence[str]) -> int:
    return max((len(line) for text in texts for line in text.split("\n")), default=0)


def _shared_out(least: Sequence[int], wanted: Sequence[int], room: int) -> list[int]:
    """Widths of columns: what each needs, and what is left for those that want more, the first of them first."""
    left = max(room - sum(least), 0)
    widths = []
    for needs, wants in zip(least, wanted, strict=True):
        more = min(left, wants - needs)
        left -= more
        widths.append(needs + more)
    return widths


def fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, title: str | None = None
) -> tuple[Table, list[str]]:
    """A table of at most so many characters, if its longest words allow it, and the heads of columns left out.

    Args:
        columns: all of them.
        rows: a text for each column; lines are broken at spaces and where they are in the text.
        width: of the terminal, in characters.
        title: above it.
    """
    share = width // NAME_SHARE
    texts = [
        [column.head, *(broken_behind(row[at], share) if column.name else row[at] for row in rows)]
        for at, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    needs = [_longest_word(text) for text in texts]
    for spare in [at for at in kept if columns[at].spare][::-1]:
        if sum(needs[at] + BORDER for at in kept) + 1 > width:
            kept.remove(spare)
    least, wanted = [needs[at] for at in kept], [_longest_line(texts[at]) for at in kept]
    widths = _shared_out(least, wanted, width - 1 - BORDER * len(kept))
    table = Table(title=title)
    for at, wide in zip(kept, widths, strict=True):
        justify = "right" if columns[at].right else "left"
        table.add_column(columns[at].head, justify=justify, width=wide, overflow="fold")  # type: ignore[arg-type]
    for row in zip(*(texts[at][1:] for at in kept), strict=True):
        table.add_row(*map(Text, row))
    return table, [column.head for at, column in enumerate(columns) if at not in kept]


def print_fitted(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """Prints a table as wide as the console, and what it had no room for."""
    table, missing = fitted(columns, rows, console.width, title)
    console.print(table)
    if missing:
        console.print(f"no room for: {', '.join(missing)}; a wider terminal or --json has them", markup=False)
