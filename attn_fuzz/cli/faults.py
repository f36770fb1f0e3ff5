"""``faults``: the fault table."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from attn_fuzz.backends.faults.fault import faults as all_faults
from attn_fuzz.campaign.plan import default_workers
from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import JsonOption, UsageError, WorkersOption
from attn_fuzz.cli.terminal import progress_console, results_console
from attn_fuzz.evaluation import seeded_faults
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.heap import fill_in_children


def faults(
    only: Annotated[list[str] | None, typer.Option(help="A fault's id; repeat for several. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Hunts per fault, each from a seed of its own.")] = 1,
    cases: Annotated[
        int, typer.Option(min=1, help="Cases after which a fault counts as missed.")
    ] = seeded_faults.MAX_CASES,
    rules: Annotated[bool, typer.Option(help="Try published tolerance rules on the same faults.")] = True,
    mode: Annotated[
        str, typer.Option(help="What hunts: narrow, or batch, which hunts those of kernels only.")
    ] = "case",
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hunt every planted fault on the CPU, without hints: caught or not, by which checks, how fast, how small."""
    known = all_faults()
    for fault in only or ():
        if fault not in known:
            raise UsageError(f"unknown fault {fault!r}; there are {', '.join(known)}")
    if mode not in ("case", "batch"):
        raise UsageError(f"unknown mode {mode!r}; faults are hunted by case or batch")
    names = list(dict.fromkeys(only or (name for name in known if mode == "case" or seeded_faults.called(name))))
    if uncalled := [name for name in names if mode == "batch" and not seeded_faults.called(name)]:
        raise UsageError(f"{uncalled[0]} is no fault of a kernel, and batches are of kernel calls")
    marks: dict[str, list[seeded_faults.MutantResult]] = {name: [] for name in names}
    caught_by: dict[str, set[str] | None] = dict.fromkeys(names)
    work = [(name, seed) for seed in [*range(seeds), *([None] if rules else [])] for name in names]
    progress = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}"),
        TimeElapsedColumn(),
        console=progress_console,
    )
    context = multiprocessing.get_context("spawn")
    # Read by glibc when a process starts, and the pool starts its processes when it likes.
    os.environ.update(fill_in_children(os.environ))
    with progress, ProcessPoolExecutor(workers or default_workers("cpu"), mp_context=context) as pool:
        task = progress.add_task("hunts", total=len(work))
        futures = [pool.submit(seeded_faults.take, name, seed, cases, mode) for name, seed in work]
        try:
            for future in as_completed(futures):
                result = future.result()
                if isinstance(result, seeded_faults.MutantResult):
                    marks[result.fault].append(result)
                    if result.finding is None:
                        progress.console.print(f"{result.fault} missed from seed {result.seed}")
                else:
                    caught_by[result[0]] = result[1]
                progress.advance(task)
        except KeyboardInterrupt:
            # What has been hunted is shown.
            pool.shutdown(cancel_futures=True)
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
