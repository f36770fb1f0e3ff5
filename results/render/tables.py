"""Committed results, and the tables of docs/results.md made from them: ``python -m results.render.tables``.

``results/*.json`` are what the commands printed, unchanged: campaigns (``attn_fuzz run --json``), examinations of the
planted faults (``attn_fuzz faults --json``) and the power table (``attn_fuzz.evaluation.power``). With matplotlib
there, ``--plot`` also draws the histograms of z.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attn_fuzz.evaluation.axes import by_number
from attn_fuzz.evaluation.published_tolerances import RULES
from attn_fuzz.oracle.checks.budget import HISTOGRAM_STEP
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.relations.company import PASSES, counted

ROOT: Final = Path(__file__).resolve().parent.parent.parent
FOLDER: Final = ROOT / "results"
PAGE: Final = ROOT / "docs" / "results.md"
LARGEST_Z: Final = FOLDER / "largest_z.md"

BEGIN: Final = "<!-- {}: python -m results.render.tables -->"
END: Final = "<!-- end of {} -->"

DTYPES: Final = ("fp32", "bf16", "fp16")

KINDS: Final = ("kernel", "layer", "batch")
"""Kernel and layer cases of the case mode, and kernel calls of batches."""

Result = dict[str, Any]


def load(folder: Path = FOLDER) -> list[Result]:
    """All results, by file name and its numbers."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=by_number)]


def campaigns(results: Iterable[Result]) -> list[Result]:
    """Those of fuzzing."""
    return [result for result in results if "backends" in result]


def _is_correct(name: str) -> bool:
    return ":" not in name


def _where(result: Result) -> str:
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "flash-attn") if name in environment)
    return f"{environment['device']}, {versions}"


def by_machine(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Campaigns of correct backends, by device and versions."""
    found: dict[str, list[Result]] = {}
    for result in campaigns(results):
        if any(_is_correct(name) for name in result["backends"]):
            found.setdefault(_where(result), []).append(result)
    return found


def largest(results: Iterable[Result], name: str) -> dict[str, float]:
    """Largest z of a backend's clean cases over several campaigns, by ``level dtype tensor``."""
    found: dict[str, float] = {}
    for result in results:
        for key, z in result["backends"].get(name, {}).get("worst_z", {}).items():
            found[key] = max(z, found.get(key, 0.0))
    return found


def _worst(mine: Mapping[str, float], dtype: str, *, rows: bool) -> str:
    """The largest of one dtype, and the tensor it was seen in."""
    some = {key: z for key, z in mine.items() if key.split()[1] == dtype and key.endswith("-rows") == rows}
    if not some:
        return "-"
    key = max(some, key=lambda name: some[name])
    level, _, tensor = key.split()
    return f"{some[key]:.1f} ({level} {tensor.removesuffix('-rows')})"


def clean_table(results: Iterable[Result]) -> list[str]:
    """Backends that are meant to be right: cases, findings, largest error."""
    lines = []
    for where, group in by_machine(results).items():
        commits = ", ".join(dict.fromkeys(f"{r['environment']['commit']} ({r['environment']['date']})" for r in group))
        names = sorted({name for result in group for name in result["backends"] if _is_correct(name)})
        total = sum(b["cases"] for r in group for name, b in r["backends"].items() if _is_correct(name))
        lines += ["", f"**{where}**: {total:,} cases; commits {commits}", ""]
        heads = ("backend", "cases", *KINDS, "documents", "known", "findings")
        lines += ["| " + " | ".join((*heads, *(f"largest z {d}" for d in DTYPES))) + " |"]
        lines += ["|---|" + "---:|" * (len(heads) - 1) + "---|" * len(DTYPES)]
        for name in names:
            mine_of = [r["backends"].get(name, {}) for r in group]
            counts = {key: sum(b.get(key, 0) for b in mine_of) for key in ("cases", "documents")}
            kinds = [
                sum(n for b in mine_of for name, n in b.get("by_kind", {}).items() if name.startswith(kind))
                for kind in KINDS
            ]
            known = sum(n for b in mine_of for n in b.get("known", {}).values())
            found = sum(finding["backend"] == name for r in group for finding in r["findings"])
            mine = largest(group, name)
            worst = " | ".join(_worst(mine, dtype, rows=False) for dtype in DTYPES)
            numbers = (counts["cases"], *kinds, counts["documents"], known, found)
            lines.append(f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + f" | {worst} |")
    return lines


def legacy_table(results: Iterable[Result]) -> list[str]:
    """The known-bad layer: how soon it was convicted, by what, and how small the case became."""
    lines = [
        "",
        "| known-bad backend | memory | device | cases to find | symptom | failing checks | shrunk case |",
        "|---|---|---|---:|---|---|---|",
    ]
    for result in campaigns(results):
        for finding in result["findings"]:
            if finding["backend"].startswith("legacy:"):
                case = ", ".join(f"{key} {value}" for key, value in finding["case"].items() if key != "level")
                lines.append(
                    f"| {finding['backend']} | {', '.join(result['poisons'])} | {result['environment']['device']} | "
                    f"{finding['cases_to_find']} | {finding['symptom']} | {', '.join(finding['checks'])} | {case} |"
                )
    return lines


def fault_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """The latest examination of every planted fault, by id."""
    examined = sorted(
        (r for r in results if "faults" in r), key=lambda r: (r["environment"]["date"], len(r["faults"]) < 50)
    )
    rows = {row["id"]: row for result in examined for row in result["faults"]}
    return [rows[name] for name in sorted(rows)]


def fault_table(results: list[Result]) -> list[str]:
    """Every planted fault: how it was caught, and which published tolerance rule would have seen it."""
    rows = fault_rows(results)
    if not rows:
        return []
    lines = [
        "",
        f"{sum(row['caught'] for row in rows)} of {len(rows)} caught from every seed; the published rules alone: "
        + ", ".join(f"{rule} {sum(rule in (row['rules'] or ()) for row in rows)}" for rule in RULES)
        + ".",
        "",
        "| fault | what is wrong | caught by | cases, by seed | seconds | documents | tokens | minimal | "
        + " | ".join(RULES)
        + " |",
        "|---|---|---|---|---:|---:|---:|---|" + "---|" * len(RULES),
    ]
    for row in rows:
        rules = " | ".join("caught" if rule in (row["rules"] or ()) else "missed" for rule in RULES)
        caught = ", ".join(row["checks"]) if row["caught"] else "**missed**"
        minimal = "yes" if row["minimal"] else "no"
        cases = ", ".join(str(count) for count in row["cases_by_seed"])
        lines.append(
            f"| {row['id']} | {row['about']} | {caught} | {cases} | {row['seconds']:.1f} | {row['documents']} | "
            f"{row['tokens']} | {minimal} | {rules} |"
        )
    return lines


def power_table(results: Iterable[Result]) -> list[str]:
    """Single wrong keys seen, of 100 random placements."""
    lines: list[str] = []
    for result in results:
        for row in result.get("power", ()):
            if not lines:
                kinds = list(row["seen"])
                lines = ["", "| keys | dtype | " + " | ".join(kinds) + " |", "|---:|---|" + "---:|" * len(kinds)]
            lines.append(
                f"| {row['length']:,} | {row['dtype']} | " + " | ".join(str(n) for n in row["seen"].values()) + " |"
            )
    return lines


def company_table(results: Iterable[Result]) -> list[str]:
    """How many documents had other bits in other company than alone, by device, torch and backend.

    Args:
        results: campaigns, and what ``attn_fuzz.evaluation.axes`` printed.
    """
    counted_of: dict[str, dict[str, Counter[str]]] = {}
    for result in results:
        where = f"{result['environment']['device']}, torch {result['environment']['torch']}"
        for backends in (result["backends"],) if "backends" in result else result["axes"].values():
            for name, told in backends.items():
                if _is_correct(name):
                    mine = counted_of.setdefault(where, {}).setdefault(name, Counter())
                    mine.update(told.get("counted", {}))
    lines: list[str] = []
    for where, counts_of in sorted(counted_of.items()):
        lines += ["", f"**{where}**", "", "| backend | forward | backward |", "|---|---:|---:|"]
        for name, counts in sorted(counts_of.items()):
            asked = {which: counts[counted(which)] for which in PASSES}
            cells = (f"{counts[counted(of, moved=True)]:,} of {asked[of]:,}" if asked[of] else "-" for of in PASSES)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def z_tables(results: list[Result]) -> str:
    """Largest z and row statistic by backend, level, dtype and tensor, as a page of its own."""
    lines = [
        "# Largest z of clean cases",
        "",
        f"By backend, level and dtype; the verdict is at {LIMIT:.0f}. `-rows`: the row statistic.",
    ]
    for where, group in by_machine(results).items():
        lines += ["", f"## {where}"]
        for name in sorted({name for result in group for name in result["backends"] if _is_correct(name)}):
            mine = largest(group, name)
            kinds = sorted({" ".join(key.split()[:2]) for key in mine})
            tensors = sorted({key.split()[2] for key in mine})
            lines += ["", f"### {name}", "", "| tensor | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
            for tensor in tensors:
                cells = (mine.get(f"{kind} {tensor}") for kind in kinds)
                lines.append(f"| {tensor} | " + " | ".join("" if z is None else f"{z:.1f}" for z in cells) + " |")
    return "\n".join(lines) + "\n"


def sections(results: list[Result]) -> dict[str, str]:
    """The page's generated sections, by name."""
    bodies = {
        "results": [*clean_table(results), *legacy_table(results)],
        "power": power_table(results),
        "faults": fault_table(results),
        "company": company_table([*load(FOLDER / "company"), *load(FOLDER / "axes")]),
    }
    return {name: "\n".join([BEGIN.format(name), *body, "", END.format(name)]) for name, body in bodies.items()}


def with_results(text: str, results: list[Result]) -> str:
    """A page's text with its generated sections made anew.

    Raises:
        ValueError: when the text lacks one of them.
    """
    for name, section in sections(results).items():
        text = with_section(text, BEGIN.format(name), section.splitlines()[1:-1], END.format(name))
    return text


def with_section(text: str, begin: str, lines: Sequence[str], end: str) -> str:
    """A text with what stands between two marks made anew.

    Raises:
        ValueError: when the text has no place for it.
    """
    if begin not in text or end not in text:
        raise ValueError(f"the text has no section between {begin!r} and {end!r}")
    head, _, rest = text.partition(begin)
    return head + "\n".join([begin, *lines, end]) + rest.partition(end)[2]


def _counts(group: Iterable[Result], name: str, dtype: str) -> list[int]:
    """A backend's elements by z, over several campaigns and all tensors of one dtype."""
    counts: list[int] = []
    for result in group:
        for key, bins in result["backends"].get(name, {}).get("histograms", {}).items():
            if key.startswith(dtype):
                counts = [a + b for a, b in zip(counts or [0] * len(bins), bins, strict=True)]
    return counts


def plot(results: list[Result], path: Path) -> None:
    """Draws, per machine and backend, the share of elements beyond each z; needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    machines = by_machine(results)
    dtypes = ("bf16", "fp16")
    figure, grid = pyplot.subplots(len(machines), 2, figsize=(13, 4 * len(machines)), sharex=True, squeeze=False)
    for row, (where, group) in zip(grid, machines.items(), strict=True):
        for axis, dtype in zip(row, dtypes, strict=True):
            for name in sorted({name for r in group for name in r["backends"] if _is_correct(name)}):
                if not (counts := _counts(group, name, dtype)):
                    continue
                beyond = [sum(counts[index:]) / sum(counts) for index in range(len(counts))]
                shown = [(index * HISTOGRAM_STEP, share) for index, share in enumerate(beyond) if share]
                axis.semilogy(*zip(*shown, strict=True), label=f"{name}, {sum(counts):.0e} elements")
            axis.axvline(LIMIT, color="black", linewidth=1)
            axis.set(title=f"{where.partition(',')[0]}, {dtype}", xlabel="z", ylabel="share of elements beyond z")
            axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Rewrites the generated sections of docs/results.md, the page of largest z, and with ``--plot`` the picture."""
    results = load()
    PAGE.write_text(with_results(PAGE.read_text(), results))
    LARGEST_Z.write_text(z_tables(results))
    if "--plot" in sys.argv[1:]:
        plot(results, FOLDER / "z.png")


if __name__ == "__main__":
    main()
