"""``bench``: how fast both modes are on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from attn_fuzz.campaign.plan import available_backends, require_available
from attn_fuzz.cli.arguments import BackendOption, DeviceOption, JsonOption, LevelOption, choices, device_of
from attn_fuzz.cli.columns import Column, print_fitted
from attn_fuzz.cli.terminal import progress_console, results_console
from attn_fuzz.evaluation.bench import bench as measure
from attn_fuzz.evaluation.bench_plan import PLANS
from attn_fuzz.evaluation.bench_processes import RATES, BenchError, bench_processes
from attn_fuzz.reference.case import LEVELS


def bench(
    backend: BackendOption = None,
    device: DeviceOption = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Batches of several processes on the device instead.")
    ] = False,
    number: Annotated[
        list[int] | None,
        typer.Option("--number", min=1, help="With --processes: how many; repeat for several. Default: 1, and many."),
    ] = None,
    level: LevelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Documents and cases per second of all modes, beside the bare kernels on the same layouts."""
    where = device_of(device)
    names = tuple(dict.fromkeys(backend or ()))
    levels = choices(level, LEVELS, "level") or LEVELS
    require_available(names, where)

    def say(line: str) -> None:
        progress_console.print(line, markup=False)

    if processes:
        measured = names or available_backends(where, (PLANS[where].dtype,))
        shared = bench_processes(where, measured, say, levels, number or ())
        if as_json:
            typer.echo(json.dumps(shared))
        else:
            show_processes(results_console(), shared)
        if shared["lost"]:
            raise BenchError(f"{shared['lost']}; the rest was not measured")
        return
    result = measure(where, names, say)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        show(results_console(), result)


def show_processes(console: Console, result: dict[str, Any]) -> None:
    """Calls per second of several processes, as people read them."""
    columns = [_column(head) for head in ("backend", "processes", "level", "batch cases/s", "bare calls/s", "ratio")]
    rows = [
        (name, str(count), level, f"{rates[judged]:,.0f}", f"{rates[bare]:,.0f}", f"{rates[bare] / rates[judged]:.1f}")
        for name, by_count in result["processes"].items()
        for count, rates in by_count.items()
        for level, (judged, bare) in RATES.items()
        if rates.get(judged)
    ]
    print_fitted(console, columns, rows, _title(result))
    if result["interrupted"]:
        console.print("interrupted: the rest was not measured")


def _title(result: dict[str, Any]) -> str:
    return f"{result['environment']['device']}, torch {result['environment']['torch']}"


def _column(head: str) -> Column:
    return Column(head, right=head != "backend", name=head == "backend", spare=head in ("documents", "documents/s"))


def show(console: Console, result: dict[str, Any]) -> None:
    """The figures as people read them."""
    columns = (
        "backend",
        "documents",
        "bare, ms",
        "packed, ms",
        "ratio",
        "packed documents/s",
        "cases/s",
        "documents/s",
    )
    rows = []
    for row in result["backends"]:
        packed = row["packed"]
        rows.append(
            (
                row["name"],
                f"{packed['documents']:,}",
                f"{1e3 * row['bare_kernel_s']:.2f}",
                f"{1e3 * packed['seconds']:.2f}",
                f"{row['packed_over_bare']:.1f}",
                f"{row['wide_documents_per_s']:,.0f}",
                f"{row['narrow_cases_per_s']:,.1f}",
                f"{row['narrow_documents_per_s']:,.0f}",
            )
        )
    print_fitted(console, [_column(head) for head in columns], rows, _title(result))
    for row in result["backends"]:
        parts = ", ".join(f"{name.replace('_', ' ')} {1e3 * s:.2f}" for name, s in row["packed"]["parts"].items())
        console.print(f"{row['name']}: milliseconds by part: {parts}")
        if (layer := row["packed_layer"]) is not None:
            ratio, own = layer["seconds"] / layer["bare_layer_s"], 1e3 * layer["bare_layer_s"]
            console.print(
                f"{row['name']}: {layer['documents_per_s']:,.0f} documents/s at layer level, "
                f"{ratio:.1f} times the layer's own {own:.2f} ms"
            )
    if (rare := result.get("rare")) is not None:
        console.print(
            f"a fault in 1 of {rare['sizes']:,} sizes: found after {rare['documents']:,} documents and "
            f"{rare['seconds']:.3f} s, shrunk to {json.dumps(rare['shrunk'])}"
        )
    for count, rate in result.get("processes", {}).get("cases_per_s", {}).items():
        console.print(f"{count} processes on {result['processes']['backend']}: {rate:,.0f} cases/s case by case")
    for name, rates in result.get("batch_processes", {}).items():
        for count, rate in rates.items():
            told = "not measured: too little came back in time" if rate is None else f"{rate:,.0f} cases/s in batches"
            console.print(f"{count} processes on {name}: {told}")
    if "cases_per_s" in (plain := result.get("plain", {})):
        console.print(
            f"a plain pytest loop on {plain['backend']}: {plain['cases_per_s']:,.1f} cases/s, "
            f"{plain['documents_per_s']:,.0f} documents/s"
        )
    if result["interrupted"]:
        console.print("interrupted: the rest was not measured")
