"""The table of clean cases in docs/ranks.md, from committed results: ``python -m results.render.rank_tables``.

``results/ranks/*.json`` are what ``attn_fuzz run --ranks N --json`` printed, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from attn_fuzz.reference.case import Case
from results.render.tables import BEGIN, END, ROOT, Result, campaigns, load, with_section

FOLDER: Final = ROOT / "results" / "ranks"
PAGE: Final = ROOT / "docs" / "ranks.md"

_BEGIN: Final = BEGIN.format("ranks").replace("results.render.tables", "results.render.rank_tables")
_END: Final = END.format("ranks")

_NAMED: Final = ("ranks", "tensor ranks", "dtype", "backend")
_COUNTED: Final = ("cases", "documents", "straddling", "findings", "largest z")


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def rank_rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """One row per number of ranks, dtype and backend, over all campaigns."""
    groups: dict[tuple[str, ...], list[tuple[Result, int]]] = {}
    for result in campaigns(results):
        for name, told in result["backends"].items():
            # The cases with the largest errors say on how many ranks all were drawn.
            worst = [Case.from_dict(data) for data in told["worst_case"].values()]
            spread = (_numbers(case.ranks for case in worst), _numbers(case.tensor_ranks for case in worst))
            found = sum(finding["backend"] == name for finding in result["findings"])
            groups.setdefault((*spread, _kinds(told["by_kind"]), name), []).append((told, found))
    rows: list[tuple[str, ...]] = []
    for key, group in sorted(groups.items()):
        counts = [sum(told[count] for told, _ in group) for count in ("cases", "documents", "straddling")]
        counts.append(sum(found for _, found in group))
        z, kind = max((z, kind) for told, _ in group for kind, z in told["worst_z"].items())
        rows.append((*key, *(f"{count:,}" for count in counts), f"{z:.1f} ({kind.split()[-1]})"))
    return rows


def _kinds(by_kind: Iterable[str]) -> str:
    return ", ".join(sorted({kind.split()[1] for kind in by_kind}))


def rank_table(results: list[Result]) -> list[str]:
    """Lines of a table for each device, with where and when it was measured."""
    lines: list[str] = []
    for device, group in sorted(_by_device(results).items()):
        fields = ("torch", "date", "commit")
        told = ", ".join(" or ".join(dict.fromkeys(f"{r['environment'][field]}" for r in group)) for field in fields)
        lines += ["", f"On {device}, {told}:", "", "| " + " | ".join((*_NAMED, *_COUNTED)) + " |"]
        lines.append("|" + "---|" * len(_NAMED) + "---:|" * len(_COUNTED))
        lines += ["| " + " | ".join(row) + " |" for row in rank_rows(group)]
    return lines


def _by_device(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in campaigns(results):
        found.setdefault(result["environment"]["device"], []).append(result)
    return found


def with_ranks(text: str, results: list[Result]) -> str:
    """The page's text with its table made anew.

    Raises:
        ValueError: when the text has no place for it.
    """
    return with_section(text, _BEGIN, [*rank_table(results), ""], _END)


def main(page: Path = PAGE) -> None:
    """Rewrites the page's table."""
    page.write_text(with_ranks(page.read_text(), load(FOLDER)))


if __name__ == "__main__":
    main()
