"""Committed campaign results, and the README's tables made from them: ``python -m attn_fuzz.results``.

``results/*.json`` are what ``python -m attn_fuzz run --json`` printed, unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "results"
README: Final = ROOT / "README.md"

BEGIN: Final = "<!-- results: python -m attn_fuzz.results -->"
END: Final = "<!-- end of results -->"

DTYPES: Final = ("fp32", "bf16", "fp16")


def load(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All results, by file name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _where(result: dict[str, Any]) -> str:
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "flash-attn") if name in environment)
    return f"{environment['device']}, {versions}, {environment['date']}, commit {environment['commit']}"


def _worst(backend: dict[str, Any], dtype: str) -> str:
    """The largest z of clean cases of one dtype, and the tensor it was seen in."""
    mine = {key: z for key, z in backend["worst_z"].items() if key.split()[1] == dtype}
    if not mine:
        return "-"
    key = max(mine, key=lambda name: mine[name])
    level, _, tensor = key.split()
    return f"{mine[key]:.1f} ({level} {tensor})"


def clean_table(results: Iterable[dict[str, Any]]) -> list[str]:
    """Backends that are meant to be right: cases, findings, largest error."""
    lines = []
    for result in results:
        rows = {name: b for name, b in result["backends"].items() if not name.startswith("legacy:")}
        if not rows:
            continue
        lines += ["", f"**{_where(result)}** (seed {result['seed']}, {result['seconds']:.0f} s):", ""]
        lines += ["| backend | cases | documents | findings | " + " | ".join(f"largest z {d}" for d in DTYPES) + " |"]
        lines += ["|---|---:|---:|---:|" + "---|" * len(DTYPES)]
        for name, backend in rows.items():
            found = sum(finding["backend"] == name for finding in result["findings"])
            worst = " | ".join(_worst(backend, dtype) for dtype in DTYPES)
            lines.append(f"| {name} | {backend['cases']} | {backend['documents']} | {found} | {worst} |")
    return lines


def legacy_table(results: Iterable[dict[str, Any]]) -> list[str]:
    """The known-bad layer: how soon it was convicted, by what, and how small the case became."""
    lines = [
        "",
        "| known-bad backend | memory | device | cases to find | symptom | failing checks | shrunk case |",
        "|---|---|---|---:|---|---|---|",
    ]
    for result in results:
        for finding in result["findings"]:
            if finding["backend"].startswith("legacy:"):
                case = ", ".join(f"{key} {value}" for key, value in finding["case"].items() if key != "level")
                lines.append(
                    f"| {finding['backend']} | {', '.join(result['poisons'])} | {result['environment']['device']} | "
                    f"{finding['cases_to_find']} | {finding['symptom']} | {', '.join(finding['checks'])} | {case} |"
                )
    return lines


def section(results: list[dict[str, Any]]) -> str:
    """The README's results section."""
    return "\n".join([BEGIN, *clean_table(results), *legacy_table(results), "", END])


def with_results(text: str, results: list[dict[str, Any]]) -> str:
    """A README text with its results section made anew.

    Raises:
        ValueError: when the text has no such section.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the README has no section between {BEGIN!r} and {END!r}")
    head, _, rest = text.partition(BEGIN)
    return head + section(results) + rest.partition(END)[2]


def main() -> None:
    """Rewrites the README's results section."""
    README.write_text(with_results(README.read_text(), load()))


if __name__ == "__main__":
    main()
