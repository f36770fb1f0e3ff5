"""``faults``: the fault table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from attn_fuzz.backends.faults.fault import faults as all_faults
from attn_fuzz.campaign import new_process
from attn_fuzz.campaign.plan import default_workers
from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import JsonOption, UsageError, WorkersOption
from attn_fuzz.cli.terminal import progress_console, results_console
from attn_fuzz.evaluation import seeded_faults
from attn_fuzz.execution.environment import environment

Result = seeded_faults.MutantResult | tuple[str, set[str]]
"""Of a hunt, or of the published rules on one fault."""


def _done(work: Sequence[tuple[str, int | None]], workers: int, cases: int, mode: str) -> Iterator[Result]:
    """What comes of (fault, seed), each in one of so many processes, until all is done or interrupted.

    Args:
        work: hunts, and with None for a seed the published rules.
        workers: processes.
        cases: after which a fault counts as missed.
        mode: what hunts.
    """
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    progress = Progress(*columns, TimeElapsedColumn(), console=progress_console)
    with progress, new_process.pool(workers) as pool:
        task = progress.add_task("hunts", total=len(work))
        futures = [pool.submit(seeded_faults.take, name, seed, cases, mode) for name, seed in work]
        try:
            for future in as_completed(futures):
                result = future.result()
                if isinstance(result, seeded_faults.MutantResult) and result.finding is None:
                    progress.console.print(f"{result.fault} missed from seed {result.seed}")
                progress.advance(task)
                yield result
        except KeyboardInterrupt:
            # What has been hunted is shown.
            pool.shutdown(cancel_futures=True)


def faults(
    only: Annotated[list[str] | None, typer.Option(help="A fault's id; repeat for several. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Hunts per fault, each from a seed of its own.")] = 1,
    cases: Annotated[
        int, typer.Option(min=1, help="Cases after which a fault counts as missed.")
    ] = seeded_faults.MAX_CASES,
    rules: Annotated[bool, typer.Option(help="Try published tolerance rules on the same faults.")] = True,
    mode: Annotated[str, typer.Option(help="What hunts: case or batch.")] = "case",
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hunt every planted fault on the CPU, without hints: caught or not, by which checks, how fast, how small.

    Two that take 65,537 documents, P14 and P15, are hunted with --only.
    """
    known = all_faults()
    for fault in only or ():
        if fault not in known:
            raise UsageError(f"unknown fault {fault!r}; there are {', '.join(known)}")
    if mode not in ("case", "batch"):
        raise UsageError(f"unknown mode {mode!r}; faults are hunted by case or batch")
    hunted = [name for name, fault in known.items() if not fault.why_not_hunted]
    names = list(dict.fromkeys(only or hunted))
    for name, planted in known.items():
        if not only and planted.why_not_hunted:
            progress_console.print(f"{name} is hunted with --only: {planted.why_not_hunted}")
    marks: dict[str, list[seeded_faults.MutantResult]] = {name: [] for name in names}
    caught_by: dict[str, set[str] | None] = dict.fromkeys(names)
    work = [(name, seed) for seed in [*range(seeds), *([None] if rules else [])] for name in names]
    for result in _done(work, workers or default_workers("cpu"), cases, mode):
        if isinstance(result, seeded_faults.MutantResult):
            marks[result.fault].append(result)
        else:
            caught_by[result[0]] = result[1]
    rows: list[dict[str, Any]] = [
        seeded_faults.row(name, sorted(marks[name], key=lambda mark: mark.seed), caught_by[name])
        for name in names
        if marks[name]
    ]
    if as_json:
        typer.echo(json.dumps({"faults": rows, "seeds": seeds, "mode": mode, "environment": environment("cpu")}))
    else:
        tables.print_faults(results_console(), rows)
    raise typer.Exit(0 if all(row["caught"] for row in rows) else 1)
