"""The tables of axes in docs/results.md, from committed results: ``python -m results.render.axes``.

``results/axes/*.json`` are what ``python -m attn_fuzz.evaluation.axes`` printed, unchanged. A row and backend may be in
several of them: their cases add up.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from attn_fuzz.execution.environment import versions_of
from results.render import tables
from results.render.tables import BEGIN, END, Result, load, with_section

FOLDER: Final = tables.FOLDER / "axes"

_BEGIN: Final = BEGIN.format("axes").replace("results.render.tables", "results.render.axes")
_END: Final = END.format("axes")

COLUMNS: Final = {
    "gradient through the LSE": "LSE gradient",
    "parts merged by LSE": "merged",
    "head_dim that is none of the usual ones": "head_dim",
    "values of fewer channels than keys": "d_v fewer",
    "values of more channels than keys": "d_v more",
    "groups above 8": "groups > 8",
    "a document of thousands of queries": "long rows",
    "rows, heads or bases beyond 2^31 elements": "2^31",
    "max_seqlen above the longest document": "loose max",
    "gaps between documents": "gaps",
    "alone and in company": "company",
    "CUDA graphs": "graphs",
    "streams": "streams",
    "torch.compile": "compile",
}
"""Titles of columns by the names of ``evaluation.axes_rows.ROWS``, whose own are too long for fourteen of them."""

_HEADS: Final = ("column", "what calls have or are asked")
_COUNTED: Final = ("backends", "fewest", "most", "together", "largest z", "findings", "known issues met")


@dataclasses.dataclass
class Had:
    """What a backend has had of a row, over all files."""

    asked: int = 0
    cases: int = 0
    largest_z: float = 0.0
    known: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, told: Result) -> None:
        """Takes what one file says of them in."""
        self.asked += told["asked"]
        self.cases += told["cases"]
        self.largest_z = max(self.largest_z, told["largest_z"])
        self.known.update(told["known"])


HadOf = Mapping[tuple[str, str], Had | None]
"""By (name of the row, backend): None for what the backend does not take; what was not tried is missing."""


def had_of(results: Iterable[Result]) -> HadOf:
    """Everything that files say, oldest first, added up."""
    added: dict[tuple[str, str], Had] = {}
    refused: dict[tuple[str, str], bool] = {}
    for result in results:
        for row, backends in result["axes"].items():
            for name, told in backends.items():
                added.setdefault((row, name), Had()).add(told)
                # What was refused before is tried since.
                refused[row, name] = False
        refused |= dict.fromkeys(_refused(result), True)
    # Of a question that none of many cases could be asked, a backend has had nothing, as where none could be drawn.
    nothing = {key for key, had in added.items() if not had.asked and (had.cases or refused[key])}
    return dict.fromkeys(refused) | {key: None if key in nothing else had for key, had in added.items()}


def _refused(result: Result) -> set[tuple[str, str]]:
    return {(told["row"], told["backend"]) for told in result["not_taken"]}


def axes_table(had: HadOf, wanted: int) -> list[str]:
    """One line per backend, one column per row of ROWS: how many cases it has had."""
    lines = ["| backend | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name in sorted({backend for _, backend in had}):
        cells = (_cell(had, (row, name), wanted) for row in COLUMNS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(had: HadOf, key: tuple[str, str], wanted: int) -> str:
    if key not in had:
        return ""
    mine = had[key]
    return "-" if mine is None else f"{mine.asked:,}" + "*" * (mine.asked < wanted)


def row_table(results: list[Result], had: HadOf) -> list[str]:
    """One line per row of ROWS: what all backends together have had of it, and what came of that."""
    lines = ["| " + " | ".join((*_HEADS, *_COUNTED)) + " |"]
    lines.append("|" + "---|" * len(_HEADS) + "---:|" * (len(_COUNTED) - 1) + "---|")
    for row, title in COLUMNS.items():
        takers = {name: mine for (of, name), mine in had.items() if of == row and mine is not None}
        counts = [mine.asked for mine in takers.values()]
        # Without a backend there is no fewest.
        numbers = [f"{count:,}" for count in (min(counts), max(counts), sum(counts))] if counts else ["-"] * 3
        cells = (title, row, f"{len(takers)}", *numbers, _worst(takers), findings(results, row), _known(takers))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _worst(takers: Mapping[str, Had]) -> str:
    """The largest z, and whose it is; of equal ones the first by name, whatever the order of files."""
    if not takers:
        return "-"
    name = max(sorted(takers), key=lambda each: takers[each].largest_z)
    return f"{takers[name].largest_z:.1f} ({name})"


def _known(takers: Mapping[str, Had]) -> str:
    met: Counter[str] = sum((mine.known for mine in takers.values()), Counter())
    return ", ".join(f"{issue} {count:,}" for issue, count in sorted(met.items())) or "-"


def findings(results: Iterable[Result], row: str) -> str:
    """How many a row has: from those that can be of no other row to those that can be of this one.

    A file keeps one finding of each backend and symptom. It says which rows it came up in, but for older files, and
    where a process died of it.
    """
    least = most = 0
    for result in results:
        refused = _refused(result)
        for finding in result["findings"]:
            if finding.get("rows"):
                least += row in finding["rows"]
                most += row in finding["rows"]
                continue
            tried = [each for each in result["axes"] if (each, finding["backend"]) not in refused]
            most += row in tried
            least += tried == [row]
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _versions(group: Iterable[Result]) -> str:
    """Those of all packages that were there in some run, each by the newest that says so."""
    every: dict[str, Any] = {}
    for result in group:
        every |= result["environment"]
    return versions_of(every)


def axes_tables(results: Iterable[Result]) -> list[str]:
    """Lines of both tables for each device and torch, with the commits that they are of.

    Not every run has all packages with kernels beside it.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        environment = result["environment"]
        groups.setdefault((environment["device"], environment["torch"]), []).append(result)
    lines: list[str] = []
    for (device, _), group in sorted(groups.items()):
        where = f"{device}, {_versions(group)}"
        commits = dict.fromkeys(f"{r['environment']['commit']} ({r['environment']['date']})" for r in group)
        had, wanted = had_of(group), min(result["cases_wanted"] for result in group)
        asterisk = f"A cell with an asterisk has fewer than the {wanted:,} that were wanted."
        lines += ["", f"On {where}; commits {', '.join(commits)}. {asterisk}", ""]
        lines += [*axes_table(had, wanted), "", *row_table(group, had)]
    return lines


def with_axes(text: str, results: Iterable[Result]) -> str:
    """The page's text with its tables of axes made anew; without results there are none.

    Raises:
        ValueError: when the text has no place for them.
    """
    return with_section(text, _BEGIN, [*axes_tables(results), ""], _END)


def main(page: Path = tables.PAGE) -> None:
    """Rewrites the tables of axes."""
    page.write_text(with_axes(page.read_text(), load(FOLDER)))


if __name__ == "__main__":
    main()
