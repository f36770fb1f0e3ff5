"""What people read on a terminal: tables of campaigns, verdicts and backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from attn_fuzz.backends import registry
from attn_fuzz.campaign.limits import Limit
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.pool import Outcome
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


def campaign_table(outcome: Outcome) -> Table:
    """One row per backend."""
    table = Table(title=f"{sum(t.cases for t in outcome.tallies.values())} cases in {outcome.seconds:.0f} s")
    for column in ("backend", "cases", "documents", "straddling", "refused", "largest z of clean cases", "findings"):
        justify = "left" if column in ("backend", "largest z of clean cases") else "right"
        # Backends differ in the ends of their names.
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name, tally in outcome.tallies.items():
        found = [finding for finding in outcome.findings if finding.backend == name]
        counts = (str(n) for n in (tally.cases, tally.documents, tally.straddling, tally.refused))
        known = "".join(f", known {issue}: {count} cases" for issue, count in sorted(tally.known.items()))
        table.add_row(name, *counts, worst(tally), (str(count_bugs(found)) if found else "none") + known)
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per finding; what is the same bug as another one is counted once."""
    linked = any(finding.same_as for finding in findings)
    table = Table(title=f"{count_bugs(findings)} findings")
    for column in ("id", *(("same as",) if linked else ()), "symptom", "backend", "device", "case"):
        table.add_column(column, overflow="fold", no_wrap=column in ("id", "same as", "symptom"))
    for finding in findings:
        first = (finding.id, finding.same_as) if linked else (finding.id,)
        table.add_row(*first, finding.symptom, finding.backend, finding.device, describe(finding.case))
    return table


def describe(case: Case) -> str:
    """A case in one line of JSON."""
    return case.to_json()


def print_findings(console: Console, findings: Iterable[Finding], stored: str | None) -> None:
    """Each finding with its shrunk case and how to replay it."""
    for finding in findings:
        console.print(
            f"\n[bold red]{finding.symptom}[/] on [bold]{finding.backend}[/] ({finding.device}), id {finding.id}"
        )
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
            console.print(f"[yellow]refused[/] {name}: {verdict}")
        elif verdict.symptoms:
            console.print(f"[bold red]FAILS[/]   {name}")
            for symptom in verdict.symptoms:
                console.print(f"          {symptom}", markup=False, soft_wrap=True)
        else:
            errors = ", ".join(f"{tensor} {z:.2f}" for tensor, z in verdict.worst_z.items())
            console.print(f"[green]clean[/]   {name}: largest z {errors}", soft_wrap=True)


def call_sequence_lines(console: Console, sequence: CallSequence) -> None:
    """The calls in a row that a case fails among, one line each."""
    asks = f", {sequence.asked} of them asked for {sequence.question.asked!r} too" if sequence.question.asked else ""
    console.print(f"in a row, unwritten memory {sequence.question.poison}{asks}:", markup=False, soft_wrap=True)
    for index in range(len(sequence.batch.ends)):
        mark = "the one that fails" if index == sequence.index else "beside it"
        console.print(f"  {mark}: {describe(sequence.batch.call(index))}", markup=False, soft_wrap=True)


def backends_table(rows: Sequence[tuple[str, str, str | None]]) -> Table:
    """One row per backend and device: availability, and what it supports."""
    table = Table()
    for column in ("backend", "device", "available", "dtypes", "head_dim", "does not take"):
        table.add_column(column)
    for name, device, reason in rows:
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
        table.add_row(
            name,
            device,
            "yes" if reason is None else f"no: {reason}",
            " ".join(capabilities.dtypes),
            f"<= {capabilities.max_head_dim}",
            ", ".join(lacks) or "-",
        )
    return table


def probes_table(answers: Mapping[str, Sequence[Answer]]) -> Table:
    """One row per backend: what it takes, and every answer that its declaration does not give."""
    table = Table(title="capabilities, measured")
    for column in ("backend", "right", "not taken", "where statement and measurement differ"):
        table.add_column(column)
    for name, found in answers.items():
        right = sum(answer.measured == RIGHT for answer in found)
        differing = [
            f"{answer.probe}: stated {'taken' if answer.stated else 'not taken'}, {answer.measured}"
            for answer in found
            if answer.differs
        ]
        table.add_row(name, str(right), str(len(found) - right), "\n".join(differing) or "-")
    return table


def faults_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per planted fault."""
    caught = sum(row["caught"] for row in rows)
    table = Table(title=f"{caught} of {len(rows)} faults caught")
    for column in ("fault", "caught by", "cases", "seconds", "documents", "tokens", "minimal", *RULES):
        table.add_column(column, justify="left" if column in ("fault", "caught by") else "right")
    for row in rows:
        rules = row["rules"]
        table.add_row(
            row["id"],
            ", ".join(row["checks"]) if row["caught"] else "MISSED",
            str(row["cases"]),
            f"{row['seconds']:.1f}",
            *("-" if row[key] is None else str(row[key]) for key in ("documents", "tokens")),
            "-" if row["minimal"] is None else "yes" if row["minimal"] else "NO",
            *("-" if rules is None else "caught" if rule in rules else "missed" for rule in RULES),
        )
    return table
