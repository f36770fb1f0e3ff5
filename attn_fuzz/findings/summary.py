"""A verdict in Markdown, for a comment or the summary of a CI job."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from attn_fuzz.execution.environment import versions_of
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.same import count_bugs
from attn_fuzz.reference.case_format import LISTED

MOST_ROWS: Final = 20
"""Findings that are listed: a comment on GitHub may have 65,536 characters."""

MOST_CHARACTERS: Final = 600
"""Of a message: enough for what was got and expected; values of a long row follow."""


def _cell(text: object) -> str:
    """A text inside a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _headline(data: Mapping[str, Any], found: Sequence[Finding]) -> str:
    names = ", ".join(f"`{name}`" for name in data.get("backends", {}))
    of = f" of {names}" if names else ""
    if "cases" not in data:
        return f"**attn-fuzz: {_counted(count_bugs(found), 'finding')} in the store.**"
    tried = f"{_counted(data['cases'], 'case')}{of} in {data['seconds']:.0f} s"
    if found:
        return f"**attn-fuzz: {_counted(count_bugs(found), 'finding')} in {tried}.**"
    if data.get("troubles"):
        return f"**attn-fuzz: no verdict, something went wrong; {tried}.**"
    if data.get("untested") or data.get("interrupted") or not data["cases"]:
        return f"**attn-fuzz: no verdict, too little was tested; {tried}.**"
    return f"**attn-fuzz: clean; {tried}.**"


def _table(found: Sequence[Finding]) -> Iterator[str]:
    yield ""
    yield "| finding | symptom | backend | checks | level | dtype | tokens | found after |"
    yield "|---|---|---|---|---|---|---:|---|"
    for finding in found[:MOST_ROWS]:
        case = finding.case
        after = f"{_counted(finding.cases_to_find, 'case')}, {finding.seconds_to_find:.1f} s"
        same = f", same as {finding.same_as}" if finding.same_as else ""
        words = (finding.id, finding.symptom + same, finding.backend, ", ".join(finding.checks), case.level, case.dtype)
        yield "| " + " | ".join(_cell(word) for word in (*words, case.tokens, after)) + " |"
    if len(found) > MOST_ROWS:
        yield f"\n{len(found) - MOST_ROWS} more are in the JSON."


def replay_command(finding: Finding) -> str:
    """How to run a finding again: by its case, or by its id where it takes more calls, or is too long to be copied."""
    if finding.sequence is not None or len(finding.case.lengths) > LISTED:
        return f"python -m attn_fuzz replay {finding.id} --store FOLDER"
    device = finding.device.partition(":")[0]
    words = ["replay", finding.case.to_json(), "--backend", finding.backend, "--device", device]
    return "python -m attn_fuzz " + shlex.join(words)


def _smallest(found: Sequence[Finding]) -> Iterator[str]:
    least = min(found, key=lambda finding: finding.case.tokens)
    yield f"\nThe smallest case, of {_counted(least.case.tokens, 'token')}, shows {least.symptom}:\n"
    yield from ("```", *(message[:MOST_CHARACTERS] for message in least.messages[:2]), least.case.in_short(), "```")
    yield "\nReplay it:\n"
    yield from ("```", replay_command(least), "```")


def _notes(data: Mapping[str, Any]) -> Iterator[str]:
    said = [*data.get("troubles", ()), *data.get("untested", ())]
    if limits := data.get("limits"):
        axes = ", ".join(dict.fromkeys(f"{limit['axis']} ({limit['how']})" for limit in limits))
        said.append(f"declared, not taken, and left out: {axes}")
    if said:
        yield ""
    yield from (f"- {_cell(sentence)}" for sentence in said)


def _versions(environment: Mapping[str, Any]) -> Iterator[str]:
    if environment:
        parts = (environment.get("device"), versions_of(dict(environment)), f"Python {environment.get('python', '?')}")
        yield f"\n{', '.join(str(part) for part in parts if part)}; {environment.get('date', 'no date')}"


def markdown(data: Mapping[str, Any]) -> str:
    """A verdict as Markdown: one line, a table of findings, the smallest case with its replay, notes, versions.

    Args:
        data: what a campaign prints with ``--json``, or ``{"findings": [...]}`` alone.

    Raises:
        FindingError: for anything else.
        CaseError: when a finding's case is impossible.
    """
    found = [Finding.from_dict(each) for each in data["findings"]]
    lines = [_headline(data, found)]
    if found:
        lines += [*_table(found), *_smallest(found)]
    lines += _notes(data)
    lines += _versions(data.get("environment") or (found[0].environment if found else {}))
    return "\n".join(lines) + "\n"
