"""The README's tables of speed, from committed bench results: ``python -m attn_fuzz.bench_table``."""

from __future__ import annotations

import json
from typing import Any, Final

from attn_fuzz.bench_plot import FOLDER, title
from attn_fuzz.results import README, with_section

_BEGIN: Final = "<!-- speed: python -m attn_fuzz.bench_table -->"
_END: Final = "<!-- end of speed -->"

_HEADS: Final = (
    "backend",
    "documents a call",
    "bare, ms",
    "wide, ms",
    "ratio",
    "wide documents/s",
    "at layer level",
    "volley cases/s",
    "over bare",
    "volley cases/s, several processes",
    "narrow cases/s",
    "wide over narrow, documents",
)


def _best(rates: dict[str, float]) -> str:
    """The highest of rates by numbers of processes, with that number."""
    if not rates:
        return "-"
    count = max(rates, key=lambda each: rates[each])
    return f"{rates[count]:,.0f} in {count}"


def _row(row: dict[str, Any], shared: dict[str, float]) -> tuple[str, ...]:
    wide, volley, layer = row["wide"], row["volley"], row["wide_layer"]
    return (
        row["name"],
        f"{wide['documents']:,}",
        f"{1e3 * row['bare_kernel_s']:.1f}",
        f"{1e3 * wide['seconds']:.1f}",
        f"{row['wide_over_bare']:.1f}",
        f"{row['wide_documents_per_s']:,.0f}",
        "-" if layer is None else f"{layer['documents_per_s']:,.0f}",
        f"{volley['cases_per_s']:,.0f}",
        f"{volley['over_bare']:.1f}",
        _best(shared),
        f"{row['narrow_cases_per_s']:,.0f}",
        f"{row['wide_over_narrow']:,.0f}",
    )


def speed_tables(results: list[dict[str, Any]]) -> list[str]:
    """Lines for each device: its table, and what was measured over all of its backends."""
    lines: list[str] = []
    for result in results:
        volleys = result["volley_processes"]
        lines += ["", f"**{title(result)}**, {result['plan']['dtype']}:", "", "| " + " | ".join(_HEADS) + " |"]
        lines.append("|---|" + "---:|" * (len(_HEADS) - 1))
        lines += ["| " + " | ".join(_row(row, volleys.get(row["name"], {}))) + " |" for row in result["backends"]]
        together, rare, shared, plain = (result[key] for key in ("together", "rare", "processes", "plain"))
        narrow = "; ".join(f"{count}: {rate:,.0f}" for count, rate in shared["cases_per_s"].items())
        tried = next(iter(volleys), "-")
        rates = "; ".join(f"{count}: {rate:,.0f}" for count, rate in volleys.get(tried, {}).items())
        lines += [
            "",
            f"- all of {', '.join(together['backends'])} on one layout: {together['over_bare']:.1f} times what their "
            f"bare kernels take together, {together['verdicts_per_s']:,.0f} document verdicts/s",
            f"- a fault in one of {rare['sizes']:,} pairs of lengths, in {rare['backend']}: found in "
            f"{rare['seconds']:.2f} s, shrunk to a single document in {rare['shrink_s']:.0f} s",
            f"- cases/s of several processes, {tried}, in volleys: {rates}; {shared['backend']}, narrow: {narrow}",
            f"- a plain pytest loop with one comparison a case, {plain['backend']}: {plain['cases_per_s']:,.0f} "
            f"cases/s, {plain['documents_per_s']:,.0f} documents/s",
        ]
    return lines


def with_speed(text: str, results: list[dict[str, Any]]) -> str:
    """The README's text with its tables of speed made anew.

    Raises:
        ValueError: when the text has no place for them.
    """
    return with_section(text, _BEGIN, [*speed_tables(results), ""], _END)


def load() -> list[dict[str, Any]]:
    """All committed bench results, by file name."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def main() -> None:
    """Rewrites the README's tables of speed."""
    README.write_text(with_speed(README.read_text(), load()))


if __name__ == "__main__":
    main()
