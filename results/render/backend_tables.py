"""``docs/backends.md``, made from what was measured: ``python -m results.render.backend_tables``.

``results/backends`` holds, unchanged, what ``attn_fuzz backends --probe --json`` (``probe*.json``) and
``upstream --json`` (``reports*.json``) printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from attn_fuzz.backends.known import KNOWN
from attn_fuzz.backends.limits import LIMITS
from attn_fuzz.campaign.limit_questions import GROUPED_VALUES
from attn_fuzz.evaluation.axes import by_number
from attn_fuzz.evaluation.capability_probe import GROUPS, RIGHT, VALUE_DIMS
from attn_fuzz.execution.environment import versions_of
from attn_fuzz.reference.case import FAR_MEMORIES

ROOT: Final = Path(__file__).resolve().parent.parent.parent
FOLDER: Final = ROOT / "results" / "backends"
PAGE: Final = ROOT / "docs" / "backends.md"

_BEYOND: Final = (
    "Of one small case each: a reason to look, and no promise. ",
    "A bound that is no argument of a kernel is right whatever it says.",
)

_BEGIN: Final = "<!-- tables: python -m results.render.backend_tables -->"

Result = dict[str, Any]

_COLUMNS: Final = {
    "GQA": ("grouped heads",),
    "past": ("causal, more keys than queries",),
    "q > k": ("causal, more queries than keys",),
    "no keys": ("documents without keys",),
    "no queries": ("documents without queries",),
    "empty": ("empty documents",),
    "window": ("window, causal", "window, non-causal"),
    "softcap": ("softcap",),
    "slices": ("memory fused", "memory head_major", "memory sliced", "memory mixed"),
    "misaligned": ("memory misaligned",),
    "capacity": ("rows beyond the last document",),
    "many heads": tuple(f"{heads} heads over {kv_heads}" for heads, kv_heads in GROUPS),
    "values": (*(f"head_dim {dim}, values {value_dim}" for dim, value_dim in VALUE_DIMS), GROUPED_VALUES),
    "LSE gradient": ("gradient of the LSE",),
    "2^31": tuple(f"memory {name}" for name in FAR_MEMORIES),
    "loose": ("max_seqlen above the longest document",),
    "gaps": ("gaps between documents of q", "gaps between documents of k"),
}
"""Columns of the capability table, and the questions that a yes needs."""


def load(pattern: str, folder: Path = FOLDER) -> list[Result]:
    """Results of one kind, by file name and its numbers; a later file's backends replace an earlier one's."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern), key=by_number)]


def _where(result: Result) -> str:
    environment = result["environment"]
    return f"{environment['device']}, {versions_of(environment)}, {environment['date']}, commit {environment['commit']}"


def _cell(answers: dict[str, Result], questions: Iterable[str]) -> str:
    """Measured: yes, no (declared and refused), or what happens against the declaration."""
    asked = [answers[question] for question in questions if question in answers]
    if not asked:
        return ""
    if all(answer["measured"] == RIGHT for answer in asked):
        return "yes"
    broken = [answer for answer in asked if answer["stated"] and answer["measured"] != RIGHT]
    if broken:
        return f"**{broken[0]['measured'].partition(':')[0]}**"
    return "part" if any(answer["measured"] == RIGHT for answer in asked) else "no"


def _named(answers: dict[str, Result], prefix: str) -> str:
    """What was right of questions that begin alike; those of values beside a head_dim are others."""
    right = (
        name.removeprefix(prefix) for name, a in answers.items() if name.startswith(prefix) and a["measured"] == RIGHT
    )
    return " ".join(name for name in right if "," not in name) or "-"


def _latest(group: Iterable[Result]) -> dict[str, Result]:
    """Probed backends by name, the last result of each."""
    return {entry["name"]: entry for result in group for entry in result["backends"] if entry.get("probes")}


def capability_lines(results: list[Result]) -> list[str]:
    """The measured capabilities of every backend, by device."""
    lines: list[str] = []
    for device in dict.fromkeys(result["device"] for result in results):
        group = [result for result in results if result["device"] == device]
        entries = _latest(group)
        lines += [f"Measured on: {'; '.join(dict.fromkeys(_where(result) for result in group))}.", ""]
        heads = ["backend", "dtypes", "head_dim", *_COLUMNS]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name, entry in sorted(entries.items()):
            answers = {answer["probe"]: answer for answer in entry["probes"]}
            cells = [f"`{name}`", _named(answers, "dtype "), _named(answers, "head_dim ")]
            lines.append("| " + " | ".join([*cells, *(_cell(answers, asked) for asked in _COLUMNS.values())]) + " |")
        lines.append("")
    return lines


def difference_lines(results: list[Result]) -> list[str]:
    """Every answer that the declaration does not give, and that is no capability beyond it."""
    lines = ["| backend | question | answer |", "|---|---|---|"]
    for device in dict.fromkeys(result["device"] for result in results):
        for name, entry in sorted(_latest(r for r in results if r["device"] == device).items()):
            for answer in entry["probes"]:
                if answer["stated"] and answer["measured"] != RIGHT:
                    said = answer["measured"].replace("|", "/").replace("\n", " ")[:160]
                    lines.append(f"| `{name}` ({device}) | {answer['probe']} | {said} |")
    return lines


def undeclared_lines(results: list[Result]) -> list[str]:
    """What was right of all that is not declared."""
    lines = ["| backend | right, and not declared |", "|---|---|"]
    for device in dict.fromkeys(result["device"] for result in results):
        for name, entry in sorted(_latest(r for r in results if r["device"] == device).items()):
            right = [each["probe"] for each in entry["probes"] if each["measured"] == RIGHT and not each["stated"]]
            if right:
                lines.append(f"| `{name}` ({device}) | {'; '.join(right)} |")
    return lines


def issue_lines() -> list[str]:
    """Known issues, from the code."""
    lines = [
        "| known issue | backends | what happens | seen | found by | script | minimal case |",
        "|---|---|---|---|---|---|---|",
    ]
    for issue in KNOWN:
        names = ", ".join(f"`{name}`" for name in issue.backends) or "all on torch's operators"
        about = issue.about + (" Runs in processes of its own." if issue.crashes else "")
        cells = (issue.id, names, about, issue.reference, issue.found_by, _script(issue.script))
        lines.append(f"| {' | '.join(cells)} | `{issue.minimal.in_short()}` |")
    return lines


def limit_lines() -> list[str]:
    """Declared limits beyond which a backend is wrong or dies, from the code."""
    lines = [
        "| limit | backend | what happens beyond it | seen | found by | script | minimal case |",
        "|---|---|---|---|---|---|---|",
    ]
    for limit in LIMITS:
        name = f"`{limit.backend.removeprefix('unrestricted:')}`"
        cells = (limit.id, name, limit.about, limit.reference, limit.found_by, _script(limit.script))
        lines.append(f"| {' | '.join(cells)} | `{limit.minimal.in_short()}` |")
    return lines


def _script(name: str) -> str:
    return f"[{name.removesuffix('.py')}](../upstream/scripts/{name})" if name else "`retest --scripts`"


def report_lines(results: list[Result]) -> list[str]:
    """Published reports, tried."""
    lines: list[str] = []
    latest: dict[str, tuple[Result, Result]] = {}
    for result in results:
        latest |= {report["id"]: (report, result) for report in result["reports"] if report["answer"] != "not tried"}
    lines += [f"Tried on: {'; '.join(dict.fromkeys(_where(result) for _, result in latest.values()))}.", ""]
    lines += ["| report | answer | seen | script |", "|---|---|---|---|"]
    for name, (report, _) in sorted(latest.items()):
        seen = report["seen"].replace("|", "/")
        script = f"[{name}](../upstream/scripts/{name}.py)"
        lines.append(f"| {report['about']} | {report['answer']} | {seen} | {script} |")
    return lines


def tables() -> str:
    """Everything on the page that is generated."""
    probes = load("probe*.json")
    parts = [
        [_BEGIN, "", "## What each takes", "", *capability_lines(probes)],
        ["## Where a declaration is not kept", "", *difference_lines(probes), ""],
        ["## What there is beyond declarations", "", "".join(_BEYOND), "", *undeclared_lines(probes), ""],
        ["## Known issues", "", *issue_lines(), ""],
        ["## Declared limits", "", *limit_lines(), ""],
        ["## Published reports", "", *report_lines(load("reports*.json")), ""],
    ]
    return "\n".join(line for part in parts for line in part)


def page(text: str) -> str:
    """The page with its tables made anew; they stand at its end.

    Raises:
        ValueError: when the page lacks the mark behind which they stand.
    """
    if _BEGIN not in text:
        raise ValueError(f"{PAGE.name} has no line {_BEGIN!r}")
    return text.partition(_BEGIN)[0] + tables()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
