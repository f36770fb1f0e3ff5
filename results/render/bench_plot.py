"""The picture of committed bench results: ``python -m results.render.bench_plot`` draws results/bench/*.json.

Take a result with ``python -m attn_fuzz bench --json > results/bench/NAME.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "bench"

_OLD_KEYS = {
    "wide": "packed",
    "wide_over_bare": "packed_over_bare",
    "wide_layer": "packed_layer",
    "narrow": "case",
    "wide_over_narrow": "packed_over_case",
}
"""What committed results of before 0.2.0 call what ``bench`` measures."""


def load(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All committed results of a folder, by file name."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for result in results:
        rows = result.get("backends", [])
        result["backends"] = [{_OLD_KEYS.get(key, key): value for key, value in row.items()} for row in rows]
    return results


PARTS = ("values", "kernels", "reference", "checks_and_rest")


def title(result: dict[str, Any]) -> str:
    """Device, plan and date in one line."""
    plan, where = result["plan"], result["environment"]
    return (
        f"{where['device']}, torch {where['torch']}, {where['date']}: up to {plan['longest'][0]} queries and "
        f"{plan['longest'][1]} keys, {plan['heads']} heads over {plan['kv_heads']}, head_dim {plan['head_dim']}"
    )


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """Where the packed mode's time goes per document, and documents per second of both modes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 3.2 * len(results)), squeeze=False)
    for (left, right), result in zip(axes, results, strict=True):
        rows = result["backends"]
        names = [row["name"] for row in rows]
        bottom = [0.0] * len(rows)
        for part in PARTS:
            heights = [1e6 * row["packed"]["parts"][part] / row["packed"]["documents"] for row in rows]
            left.bar(names, heights, bottom=bottom, label=part.replace("_", " "))
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        bare = [1e6 * row["bare_kernel_s"] / row["packed"]["documents"] for row in rows]
        left.plot(names, bare, "k_", markersize=24, label="bare kernel")
        left.set_ylabel("microseconds per document")
        # Room for the legend.
        left.set_ylim(0, 1.3 * max(bottom))
        left.legend(fontsize=7, ncols=5, loc="upper center")
        for key, label in (("wide_documents_per_s", "packed"), ("narrow_documents_per_s", "case by case")):
            right.plot(names, [row[key] for row in rows], "o", label=label)
        if plain := result.get("plain", {}).get("documents_per_s"):
            right.axhline(plain, color="grey", label="plain pytest loop")
        right.set_yscale("log")
        right.set_ylabel("documents per second")
        right.legend(fontsize=7)
        left.set_title(title(result), fontsize=8, loc="left")
        for side in (left, right):
            side.tick_params(axis="x", labelrotation=20)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    """Draws all committed results."""
    draw(load(), FOLDER.parent / "bench.png")


if __name__ == "__main__":
    main()
