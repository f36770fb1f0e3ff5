"""Tables of speed in docs/results.md, from committed bench results: ``python -m results.render.bench_table``."""

from __future__ import annotations

from typing import Any, Final

from results.render.bench_plot import FOLDER, load, title
from results.render.tables import PAGE, with_section

SHARED: Final = FOLDER / "processes"
"""Results of ``bench --processes --json``."""

_BEGIN: Final = "<!-- speed: python -m results.render.bench_table -->"
_END: Final = "<!-- end of speed -->"

_HEADS: Final = (
    "backend",
    "documents a call",
    "bare, ms",
    "packed, ms",
    "ratio",
    "packed documents/s",
    "at layer level",
    "batch cases/s",
    "over bare",
    "cases/s",
    "wide over narrow, documents",
)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    packed, batch, layer = row["packed"], row["batch"], row["packed_layer"]
    return (
        row["name"],
        f"{packed['documents']:,}",
        f"{1e3 * row['bare_kernel_s']:.1f}",
        f"{1e3 * packed['seconds']:.1f}",
        f"{row['packed_over_bare']:.1f}",
        f"{row['wide_documents_per_s']:,.0f}",
        "-" if layer is None else f"{layer['documents_per_s']:,.0f}",
        f"{batch['cases_per_s']:,.0f}",
        f"{batch['over_bare']:.1f}",
        f"{row['narrow_cases_per_s']:,.0f}",
        f"{row['packed_over_case']:,.0f}",
    )


def speed_tables(results: list[dict[str, Any]]) -> list[str]:
    """Lines for each device: its table, and what was measured over all of its backends."""
    lines: list[str] = []
    for result in results:
        lines += ["", f"**{title(result)}**, {result['plan']['dtype']}:", "", "| " + " | ".join(_HEADS) + " |"]
        lines.append("|---|" + "---:|" * (len(_HEADS) - 1))
        lines += ["| " + " | ".join(_row(row)) + " |" for row in result["backends"]]
        rare, shared, plain = (result[key] for key in ("rare", "processes", "plain"))
        narrow = ", ".join(f"{rate:,.0f} in {count}" for count, rate in shared["cases_per_s"].items())
        drawn = "; ".join(
            f"{name}: {', '.join(f'{rate:,.0f} in {count}' for count, rate in rates.items() if rate is not None)}"
            for name, rates in result["batch_processes"].items()
            if any(rate is not None for rate in rates.values())
        )
        lines += [
            "",
            f"- a fault in one of {rare['sizes']:,} pairs of lengths, in {rare['backend']}: found in "
            f"{rare['seconds']:.2f} s, shrunk to a single document in {rare['shrink_s']:.0f} s",
            f"- cases/s of several processes, as a campaign draws them, in batches: {drawn}",
            f"- cases/s of several processes, {shared['backend']}, case by case: {narrow}",
            f"- a plain pytest loop with one comparison a case, {plain['backend']}: {plain['cases_per_s']:,.0f} "
            f"cases/s, {plain['documents_per_s']:,.0f} documents/s",
        ]
    return lines


def process_tables(results: list[dict[str, Any]]) -> list[str]:
    """Lines for each device: batches of several processes that share it, beside as many that call the bare kernel."""
    lines: list[str] = []
    for result in results:
        commit = result["environment"]["commit"]
        lines += [
            "",
            f"**Several processes on one device, batches on the same layout**, {title(result)} ({commit}):",
            "",
        ]
        heads = ("backend", "processes", "cases/s", "bare calls/s", "over bare")
        lines += ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for name, by_count in result["processes"].items():
            for count, rates in sorted(by_count.items(), key=lambda item: int(item[0])):
                whole, bare = rates["cases_per_s"], rates["bare_calls_per_s"]
                lines.append(f"| {name} | {count} | {whole:,.0f} | {bare:,.0f} | {bare / whole:.1f} |")
    return lines


def with_speed(text: str, results: list[dict[str, Any]], shared: list[dict[str, Any]]) -> str:
    """The page's text with its tables of speed made anew.

    Args:
        text: the page's.
        results: of ``bench``.
        shared: of ``bench --processes``.

    Raises:
        ValueError: when the text has no place for them.
    """
    return with_section(text, _BEGIN, [*speed_tables(results), *process_tables(shared), ""], _END)


def main() -> None:
    """Rewrites the tables of speed."""
    PAGE.write_text(with_speed(PAGE.read_text(), load(), load(SHARED)))


if __name__ == "__main__":
    main()
