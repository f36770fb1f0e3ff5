"""How many cases each axis of a case has had on each backend that takes it, what came of them, and the largest z.

    python -m attn_fuzz.evaluation.axes --cases 2000 > axes.json

runs kernel calls in batches, forward and backward, in which every call has the value of an axis that the row is about,
or is asked what the row is about.

    python -m attn_fuzz.evaluation.axes --cases 2000 --has axes.json > more.json

runs what that run had too little of, with other cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.registry import UnknownBackend
from attn_fuzz.batch.judge import schedule_on
from attn_fuzz.campaign.batch_worker import REFUSED_BATCHES
from attn_fuzz.campaign.messages import Assignment, CampaignError, Found, Message, Tally
from attn_fuzz.campaign.plan import (
    CampaignOptions,
    aims_of,
    available_backends,
    default_device,
    default_workers,
    devices_in_turn,
    kind_of,
    plan,
    require_available,
)
from attn_fuzz.campaign.pool import Outcome, Pool, Worker
from attn_fuzz.evaluation.axes_rows import ROWS, Row
from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.finding import Finding
from attn_fuzz.reference.case import FAR_MEMORIES

_SLOW: Final = ("nested", "cudnn", "flex", "loop")
"""What is in the names of backends whose calls take milliseconds: they begin first."""

FAR_AT_A_TIME: Final = 3
"""Processes whose rows are far apart: each takes up to 16 GiB, and half of a GPU has to be free besides."""

_MOST_TOGETHER: Final = {False: 8, True: 4}
"""Processes that share a row of a backend, by whether it compiles: each does so for all that the others compile."""

_ENOUGH: Final = 100
"""Calls none of which could be asked what a row is about: others will not be, either."""

JobOf = tuple[str, str]
"""(name of the row, backend)."""


class _Table(Pool):
    """One that goes on where an assignment cannot be done, and knows in which rows something was found."""

    def __init__(self, assignments: Sequence[Assignment], workers: int, on_finding: Callable[[Finding], None]) -> None:
        super().__init__(assignments, workers, lambda tallies: None, on_finding)
        self.rows: dict[tuple[str, str], set[str]] = {}
        """By backend and symptom."""

    def _take(self, worker: Worker, message: Message) -> None:
        if isinstance(message, Found):
            key = message.finding.backend, message.finding.symptom
            self.rows.setdefault(key, set()).add(worker.assignment.label)
        super()._take(worker, message)

    def told(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Its findings, ready for JSON, each with the rows that it came up in; a death of a process is of none."""
        return [
            {**finding.to_dict(), "rows": sorted(self.rows.get((finding.backend, finding.symptom), ()))}
            for finding in outcome.findings
        ]

    def cannot(self, worker: Worker, reason: str) -> None:
        self.troubles.append(f"{worker.assignment.backend}, {worker.assignment.label}: {reason}")
        worker.finished = True


def _options(row: Row, device: str, workers: int, cases: int, seed: int) -> CampaignOptions:
    return CampaignOptions(
        device=device,
        workers=workers,
        seed=seed,
        cases=round(row.drawn * cases),
        levels=("kernel",),
        modes=(row.mode,),
        asked=(row.asked,) if row.asked else (),
    )


def by_number(path: Path) -> list[str | int]:
    """A key by which files with numbers in their names are in their order: the tenth is not the second."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What earlier runs have had."""

    runs: int = 0
    asked: Mapping[JobOf, int] = dataclasses.field(default_factory=Counter)
    seconds: Mapping[JobOf, float] = dataclasses.field(default_factory=dict)
    """What those took, of one process."""
    last: Mapping[JobOf, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """(cases that the last of them that had any had, how many of these could be asked)."""

    @classmethod
    def read(cls, files: Sequence[Path]) -> Earlier:
        """Of what they printed. Raises SystemExit with a sentence for a file that is none of those."""
        asked, seconds, last = Counter[JobOf](), defaultdict[JobOf, float](float), dict[JobOf, tuple[int, int]]()
        for file in sorted(files, key=by_number):
            try:
                for row, told in json.loads(file.read_text())["axes"].items():
                    for name, had in told.items():
                        asked[row, name] += had["asked"]
                        seconds[row, name] += had.get("process_seconds", had.get("seconds", 0.0))
                        if had.get("cases"):
                            last[row, name] = had["cases"], had["asked"]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise SystemExit(f"{file} is no table of axes; give what this command printed") from None
        return cls(len(files), asked, seconds, last)

    def needs(self, job: JobOf, cases: int) -> float | None:
        """Seconds that so many more cases would take one process; None where nothing is known of it."""
        return cases * self.seconds.get(job, 0.0) / self.asked[job] if self.asked[job] else None

    def why_not(self, job: JobOf) -> str | None:
        """Why a question need not be put again."""
        cases, asked = self.last.get(job, (0, 0))
        none = cases >= _ENOUGH and not asked and not self.asked[job]
        return f"none of {cases:,} calls could be asked" if none else None


NOTHING: Final = Earlier()


def jobs(
    rows: Sequence[Row],
    names: Sequence[str],
    device: str,
    workers: int,
    cases: int,
    seconds: float,
    earlier: Earlier = NOTHING,
) -> tuple[list[Assignment], dict[JobOf, str]]:
    """(assignments for each row and backend that takes it, why the others do not).

    One that would take a process too long, by what earlier runs took, is shared by several.

    Args:
        rows: which.
        names: backends.
        device: ``cpu`` or ``cuda``.
        workers: processes at a time.
        cases: of each.
        seconds: after which one is ended however many it has had.
        earlier: what need not be run again; other cases are drawn than there.
    """
    found: list[tuple[float, Assignment]] = []
    refused: dict[JobOf, str] = {}
    asked = {question.asked for question in schedule_on(kind_of(device))}
    for number, row in enumerate(rows):
        if row.mode == "batch" and row.asked and row.asked not in asked:
            refused |= {(row.name, name): "it is not asked on this device" for name in names}
            continue
        for name in names:
            if (left := cases - earlier.asked[row.name, name]) <= 0:
                continue
            if (why := earlier.why_not((row.name, name))) is not None:
                refused[row.name, name] = why
                continue
            stated = registry.load(name).kernel.capabilities_on(kind_of(device))
            options = _options(row, device, workers, left, seed=31 + number + 1000 * earlier.runs)
            options = dataclasses.replace(options, aim=row.aim_of(stated))
            if options.aim and (why := aims_of(name, options).why_not(options.modes)) is not None:
                refused[row.name, name] = why
                continue
            try:
                made = plan((name,), options)
            except CampaignError as reason:
                refused[row.name, name] = str(reason)
                continue
            needs = earlier.needs((row.name, name), left)
            count = min(_MOST_TOGETHER[bool(stated.compiles)], max(1, math.ceil((needs or 0.0) / seconds)))
            of_row = {"cases": math.ceil((options.cases or 0) / count), "seconds": seconds, "label": row.name}
            for part in range(count):
                # Those of a row are as far apart as there are seeds between rows.
                job = dataclasses.replace(made[0], **of_row, seed=made[0].seed + part)  # type: ignore[arg-type]
                found.append((seconds if needs is None else needs, job))
    # Those that take longest first, and what may.
    found.sort(key=lambda each: (-each[0], not any(part in each[1].backend for part in _SLOW)))
    devices = devices_in_turn(device)
    return [dataclasses.replace(job, device=devices[n % len(devices)]) for n, (_, job) in enumerate(found)], refused


def measured(row: Row, tally: Tally, spent: float) -> dict[str, Any]:
    """What a row of the table says of a backend, ready for JSON; ``spent``: seconds of all processes that had part."""
    return {
        "asked": row.count(tally),
        "cases": tally.cases,
        "documents": tally.documents,
        "seconds": round(tally.seconds, 1),
        "process_seconds": round(spent, 1),
        "compiling_seconds": round(tally.compiling_seconds, 1),
        "configurations": len(tally.by_configuration),
        "largest_z": round(max(tally.worst_z.values(), default=0.0), 2),
        "known": tally.known,
        "counted": dict(sorted(tally.counted.items())),
    }


def _rows(named: Sequence[str]) -> list[Row]:
    """Those that were named, or all. Raises SystemExit with a sentence for one that there is not."""
    by_name = {row.name: row for row in ROWS}
    for name in named:
        if name not in by_name:
            raise SystemExit(f"no such row: {name!r}; there are: {'; '.join(by_name)}")
    return [by_name[name] for name in named] or list(ROWS)


def _there(device: str, backends: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """(device, backends that were named or all that run on it). Raises SystemExit with a sentence where none does."""
    if device not in ("cpu", "cuda"):
        raise SystemExit(f"unknown device {device!r}; use cpu or cuda")
    try:
        require_available(backends, device)
    except (UnknownBackend, BackendUnavailable) as reason:
        raise SystemExit(str(reason)) from None
    if not (names := tuple(backends) or available_backends(device)):
        raise SystemExit(f"no backend runs on {device} here")
    return device, names


def main(
    backend: Annotated[list[str] | None, typer.Option("--backend", "-b", help="Default: all available.")] = None,
    named: Annotated[list[str] | None, typer.Option("--row", help="Name of a row. Default: all.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="Of each row and backend.")] = 2000,
    seconds: Annotated[float, typer.Option(min=1.0, help="For each at most.")] = 60.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time.")] = None,
    has: Annotated[list[Path] | None, typer.Option(help="What earlier runs printed, and need not have again.")] = None,
) -> None:
    """Prints the table of axes as JSON; what it is at goes to standard error."""
    rows = _rows(named or ())
    where, names = _there(device or default_device(), backend or ())
    places = workers or default_workers(where)
    earlier = Earlier.read(has or ())
    found, refused = jobs(rows, names, where, places, cases, seconds, earlier)
    if not found and any(earlier.asked[row.name, name] for row in rows for name in names):
        raise SystemExit(f"there is nothing left to run: all that is taken has had {cases} cases")
    if not found:
        raise SystemExit(f"none of {', '.join(names)} takes any of that: {next(iter(refused.values()))}")
    findings: list[Finding] = []

    def note(finding: Finding) -> None:
        findings.append(finding)
        print(f"{finding.backend}: {finding.messages[0]}", file=sys.stderr)

    far = [job for job in found if set(job.aim.get("memory", ())) & set(FAR_MEMORIES)]
    parts = [(far, min(places, FAR_AT_A_TIME)), ([job for job in found if job not in far], places)]
    outcomes, found_in = list[Outcome](), list[dict[str, Any]]()
    for some, at_a_time in parts:
        if some and not any(outcome.interrupted for outcome in outcomes):
            pool = _Table(some, at_a_time, note)
            outcomes.append(pool.run())
            found_in += pool.told(outcomes[-1])
    table: dict[str, dict[str, Tally]] = {each.name: {} for each in rows}
    spent = defaultdict[JobOf, float](float)
    for job, tally in itertools.chain.from_iterable(outcome.of_assignments for outcome in outcomes):
        table[job.label].setdefault(job.backend, Tally()).add(tally)
        spent[job.label, job.backend] += tally.seconds
    for label, by_backend in table.items():
        for name, tally in by_backend.items():
            # One that no time was left for has drawn none, either.
            if tally.refused > REFUSED_BATCHES and not tally.cases:
                none = f"none of {tally.refused:,} batches has a call that it takes"
                refused[label, name] = f"{none}, most for this: {tally.why_refused}" if tally.why_refused else none
    told = {
        "axes": {
            row.name: {name: measured(row, tally, spent[row.name, name]) for name, tally in table[row.name].items()}
            for row in rows
        },
        "not_taken": [{"row": name, "backend": kernel, "why": why} for (name, kernel), why in refused.items()],
        "findings": found_in,
        "troubles": [trouble for outcome in outcomes for trouble in outcome.troubles],
        "interrupted": any(outcome.interrupted for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "cases_wanted": cases,
        "environment": environment(where),
    }
    print(json.dumps(told))
    # Neither is a pass.
    sys.exit(1 if findings else 3 if told["interrupted"] or not any(table.values()) else 0)


if __name__ == "__main__":
    typer.run(main)
