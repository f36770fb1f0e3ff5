"""What people read on a terminal: tables of campaigns, verdicts and backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from attn_fuzz.backends import registry
from attn_fuzz.campaign.limits import Limit
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.pool import Outcome
from attn_fuzz.cli.columns import NAME_SHARE, Column, broken_behind, print_fitted
from attn_fuzz.cli.counted import counted_lines
from attn_fuzz.evaluation.capability_probe import RIGHT, Answer
from attn_fuzz.evaluation.published_tolerances import RULES
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.same import count_bugs
from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.reduction.call_sequence import CallSequence
from attn_fuzz.reference.case import Case


def worst(tally: Tally) -> str:
    """The largest error of clean cases, and where."""
    if not tally.worst_z:
        return "-"
    key, z = max(tally.worst_z.items(), key=lambda item: item[1])
    return f"{z:.1f} ({key})"


def print_campaign(console: Console, outcome: Outcome) -> None:
    """One row per backend, and the known issues that their cases met."""
    compiled = any(tally.by_configuration for tally in outcome.tallies.values())
    columns = (
        Column("backend", name=True),
        Column("cases", right=True),
        Column("documents", right=True),
        Column("straddling", right=True, spare=True),
        Column("refused", right=True, spare=True),
        *([Column("configurations", right=True), Column("compiling, s", right=True)] if compiled else []),
        Column("largest z of clean cases"),
        Column("findings", right=True),
    )
    rows = []
    for name, tally in outcome.tallies.items():
        found = [finding for finding in outcome.findings if finding.backend == name]
        counts = (str(n) for n in (tally.cases, tally.documents, tally.straddling, tally.refused))
        own = (str(len(tally.by_configuration) or "-"), f"{tally.compiling_seconds:.0f}") if compiled else ()
        rows.append((name, *counts, *own, worst(tally), str(count_bugs(found) or "none")))
    title = f"{sum(tally.cases for tally in outcome.tallies.values())} cases in {outcome.seconds:.0f} s"
    print_fitted(console, columns, rows, title)
    for name, tally in outcome.tallies.items():
        for issue, count in sorted(tally.known.items()):
            console.print(f"{name}: {count} cases are explained by the known issue {issue}", markup=False)
        for line in counted_lines(tally.counted):
            console.print(f"{name}: {line}", markup=False, soft_wrap=True)


def print_findings_table(console: Console, findings: Sequence[Finding]) -> None:
    """One row per finding; what is the same bug as another one is counted once."""
    columns = (Column("id"), Column("finding"), Column("case"))
    rows = []
    for finding in findings:
        backend = broken_behind(finding.backend, console.width // NAME_SHARE)
        same = f"\nsame as {finding.same_as}" if finding.same_as else ""
        rows.append((finding.id, f"{finding.symptom}\n{backend}\non {finding.device}{same}", describe(finding.case)))
    print_fitted(console, columns, rows, f"{count_bugs(findings)} findings")


def describe(case: Case) -> str:
    """A case in one line."""
    return case.in_short()


def print_findings(console: Console, findings: Iterable[Finding], stored: str | None) -> None:
    """Each finding with its shrunk case and how to replay it."""
    for finding in findings:
        on = f"[bold]{escape(finding.backend)}[/] ({finding.device})"
        console.print(f"\n[bold red]{finding.symptom}[/] on {on}, id {finding.id}", soft_wrap=True)
        if finding.same_as:
            console.print(f"  same as {finding.same_as}, which was found before", markup=False)
        for message in finding.messages[:3]:
            console.print(f"  {message}", markup=False, soft_wrap=True)
        console.print(f"  case: {describe(finding.case)}", markup=False, soft_wrap=True)
        console.print(
            f"  found after {finding.cases_to_find} cases and {finding.seconds_to_find:.1f} s; "
            f"checks that fail: {', '.join(finding.checks)}",
            markup=False,
        )
        if stored is not None:
            console.print(
                f"  replay: python -m attn_fuzz replay {finding.id} --store {stored}", markup=False, soft_wrap=True
            )


def print_limits(console: Console, limits: Sequence[Limit]) -> None:
    """What a user's kernel declares and does not take, each with its case."""
    if limits:
        console.print("\n[bold]limits found[/], which the campaign went on without (--strict makes them findings):")
    for limit in limits:
        console.print(f"  {limit.axis} {limit.how}: {limit.message}", markup=False, soft_wrap=True)
        console.print(f"    case: {describe(limit.case)}", markup=False, soft_wrap=True)
        if limit.below is not None:
            console.print(f"    known below it: {limit.below}", markup=False, soft_wrap=True)


def verdict_lines(console: Console, case: Case, results: Sequence[tuple[str, Verdict | str]]) -> None:
    """The verdict of every backend on one case."""
    console.print(f"case: {describe(case)}", markup=False, soft_wrap=True)
    for name, verdict in results:
        if isinstance(verdict, str):
            console.print(f"[yellow]refused[/] {escape(f'{name}: {verdict}')}", soft_wrap=True)
        elif verdict.symptoms:
            console.print(f"[bold red]FAILS[/]   {escape(name)}")
            for symptom in verdict.symptoms:
                console.print(f"          {symptom}", markup=False, soft_wrap=True)
        else:
            errors = ", ".join(f"{tensor} {z:.2f}" for tensor, z in verdict.worst_z.items())
            console.print(f"[green]clean[/]   {escape(name)}: largest z {errors}", soft_wrap=True)


def call_sequence_lines(console: Console, sequence: CallSequence) -> None:
    """The calls in a row that a case fails among, one line each."""
    asks = f", {sequence.asked} of them asked for {sequence.question.asked!r} too" if sequence.question.asked else ""
    console.print(f"in a row, unwritten memory {sequence.question.poison}{asks}:", markup=False, soft_wrap=True)
    for index in range(len(sequence.batch.ends)):
        mark = "the one that fails" if index == sequence.index else "beside it"
        console.print(f"  {mark}: {describe(sequence.batch.call(index))}", markup=False, soft_wrap=True)


def print_backends(console: Console, rows: Sequence[tuple[str, str, str | None]]) -> None:
    """One row per backend: where it is available, and what it supports."""
    columns = (
        Column("backend", name=True),
        Column("available"),
        Column("dtypes", spare=True),
        Column("head_dim", spare=True),
        Column("does not take"),
    )
    told = []
    for name in dict.fromkeys(name for name, _, _ in rows):
        places = [f"{where}: {reason or 'yes'}" for other, where, reason in rows if other == name]
        capabilities = registry.load(name).kernel.capabilities
        lacks = [
            word
            for word, has in (
                ("GQA", capabilities.gqa),
                ("windows", capabilities.window),
                ("softcap", capabilities.softcap),
                ("empty documents", capabilities.empty_documents),
                ("queries without keys", capabilities.queries_without_keys),
                ("keys without queries", capabilities.keys_without_queries),
                ("q != k causal", not capabilities.causal_needs_equal_lengths),
            )
            if not has
        ]
        dtypes, dim = " ".join(capabilities.dtypes), f"up to {capabilities.max_head_dim}"
        told.append((name, "\n".join(places), dtypes, dim, ", ".join(lacks) or "-"))
    print_fitted(console, columns, told)


def print_probes(console: Console, answers: Mapping[str, Sequence[Answer]]) -> None:
    """One row per backend: what it takes, and every answer that its declaration does not give."""
    columns = (
        Column("backend", name=True),
        Column("right", right=True),
        Column("not taken", right=True),
        Column("where statement and measurement differ"),
    )
    rows = []
    for name, found in answers.items():
        right = sum(answer.measured == RIGHT for answer in found)
        differing = [
            f"{answer.probe}: stated {'taken' if answer.stated else 'not taken'}, {answer.measured}"
            for answer in found
            if answer.differs
        ]
        rows.append((name, str(right), str(len(found) - right), "\n".join(differing) or "-"))
    print_fitted(console, columns, rows, "capabilities, measured")


def print_faults(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One row per seeded fault."""
    numbers = ("cases", "seconds", "documents", "tokens")
    columns = (
        Column("fault", name=True),
        Column("caught by"),
        *(Column(head, right=True, spare=head in ("documents", "tokens")) for head in numbers),
        Column("minimal", right=True, spare=True),
        *(Column(rule, right=True, spare=True) for rule in RULES),
    )
    told = []
    for row in rows:
        rules = row["rules"]
        told.append(
            (
                row["id"],
                ", ".join(row["checks"]) if row["caught"] else "MISSED",
                str(row["cases"]),
                f"{row['seconds']:.1f}",
                *("-" if row[key] is None else str(row[key]) for key in ("documents", "tokens")),
                "-" if row["minimal"] is None else "yes" if row["minimal"] else "NO",
                *("-" if rules is None else "caught" if rule in rules else "missed" for rule in RULES),
            )
        )
    print_fitted(console, columns, told, f"{sum(row['caught'] for row in rows)} of {len(rows)} faults caught")
