"""A script as a report for an issue tracker: what happens, on which versions, how to see it, what it said here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from attn_fuzz.findings.scripts.run import Ran

MOST_CHARACTERS: Final = 600
"""Of a sentence: enough for what was got and expected; values of a long row follow."""

_LEFT_OUT: Final = ("commit", "hypothesis", "date")
"""Of an environment: what says nothing about the backend."""

_CASE: Final = "Case: "


def _told(script: str) -> str:
    """The case, which the head of a script tells."""
    return next((line.removeprefix(_CASE) for line in script.splitlines() if line.startswith(_CASE)), "")


def tracker_report(
    title: str, sentences: Sequence[str], script: str, ran: Ran, environment: Mapping[str, object]
) -> str:
    """The report, in Markdown.

    Args:
        title: what is wrong, in a line.
        sentences: what is wrong in detail.
        script: its text.
        ran: what it said when it was run here.
        environment: versions and device of that run (``execution.environment.environment``).
    """
    status = "it did not come back" if ran.status is None else f"exit status {ran.status}"
    versions = [f"| {name} | {value} |" for name, value in environment.items() if name not in _LEFT_OUT]
    lines = [f"# {title}", ""]
    lines += [f"- {sentence[:MOST_CHARACTERS]}" for sentence in sentences]
    lines += ["", "## Versions", "", "| | |", "|---|---|", *versions]
    lines += [
        "",
        "## To reproduce",
        "",
        "`reproduce.py` exits with 1 while the fault is there, and with 0 once it is gone.",
    ]
    lines += ["", "```python", script.rstrip("\n"), "```"]
    lines += ["", f"It said here, on {environment.get('date', 'an unknown date')} ({status}):"]
    lines += ["", "```", ran.output, "```", ""]
    lines += [f"Found by differential testing, and shrunk to this case: `{_told(script)}`"]
    return "\n".join(lines) + "\n"
