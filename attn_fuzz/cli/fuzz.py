"""``run``, ``check`` and ``check-layer``: campaigns, from options to exit status."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_fuzz.backends import registry
from attn_fuzz.campaign.limits import Limit, LimitsFound, finding_of, infer_limits
from attn_fuzz.campaign.plan import available_backends, default_workers, plan, require_available, takes_batches
from attn_fuzz.campaign.pool import Outcome, Pool
from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import (
    DEFAULT_SECONDS,
    DEFAULT_STORE,
    BackendOption,
    CasesOption,
    DeviceOption,
    DtypeOption,
    FirstOption,
    JsonOption,
    LevelOption,
    ModeOption,
    RanksOption,
    SecondsOption,
    SeedOption,
    StoreOption,
    StrictOption,
    TensorRanksOption,
    UsageError,
    WorkersOption,
    choices,
    device_of,
    modes_of,
)
from attn_fuzz.cli.terminal import Screen, progress_console, results_console
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.ranks.client import MAX_RANKS
from attn_fuzz.reference.case import DTYPES, LEVELS


def campaign_dict(outcome: Outcome, device: str, seed: int, poisons: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a campaign."""
    return {
        "cases": sum(tally.cases for tally in outcome.tallies.values()),
        "documents": sum(tally.documents for tally in outcome.tallies.values()),
        "seconds": round(outcome.seconds, 3),
        "seed": seed,
        "poisons": list(poisons),
        "interrupted": outcome.interrupted,
        "troubles": list(outcome.troubles),
        "environment": environment(device),
        "backends": {
            name: {
                "cases": tally.cases,
                "documents": tally.documents,
                "straddling": tally.straddling,
                "refused": tally.refused,
                "repeated": tally.repeated,
                "warm_up_seconds": round(tally.warm_up_seconds, 1),
                "by_kind": dict(sorted(tally.by_kind.items())),
                "paths": tally.paths,
                "known": tally.known,
                "histograms": dict(sorted(tally.histograms.items())),
                "worst_z": {key: round(z, 3) for key, z in sorted(tally.worst_z.items())},
                "worst_case": {key: json.loads(tally.worst_case[key]) for key in sorted(tally.worst_z)},
            }
            for name, tally in outcome.tallies.items()
        },
        "findings": [finding.to_dict() for finding in outcome.findings],
    }


def _fuzz(
    names: tuple[str, ...],
    where: str,
    *,
    seconds: float | None,
    cases: int | None,
    seed: int,
    levels: tuple[str, ...],
    dtypes: tuple[str, ...],
    ranks: list[int] | None,
    tensor_ranks: list[int] | None,
    poisons: tuple[str, ...],
    modes: tuple[str, ...] = ("case",),
    first: bool,
    workers: int | None,
    store: Path,
    as_json: bool,
    named: bool = True,
    strict: bool | None = None,
) -> None:
    """A campaign from assignments to exit status.

    Args:
        named: somebody asked for these very backends.
        strict: of a user's backend, whether limits are findings; None for one of ours, which is not asked for any.
    """
    if seconds is not None and cases is not None:
        raise UsageError("--seconds and --cases exclude each other")
    if seconds is not None and math.isnan(seconds):
        raise UsageError("--seconds must be a number")
    require_available(names, where, dtypes)
    for name in names:
        if not set(levels) & set(offered := registry.load(name).levels):
            raise UsageError(f"{name} has no {' or '.join(levels)} level; use --level {' or '.join(offered)}")
    if modes == ("batch",) and "kernel" in levels and not named:
        # Those that nobody asked for by name, and that batches cannot test, are left to the other modes.
        names = tuple(name for name in names if takes_batches(name, levels, where))
    if modes == ("batch",) and not (names and all(takes_batches(name, levels, where) for name in names)):
        raise UsageError(
            "batches are of kernel calls: they need --level kernel, and backends with a kernel level that compile "
            "neither for every layout nor for every option"
        )
    kept = Store(store)
    kept.prepare()
    if cases is None and seconds is None:
        seconds = DEFAULT_SECONDS
    found_out = LimitsFound() if strict is None else _found_out(names[0], where, dtypes, workers)
    together = max(ranks or (1,)) * max(tensor_ranks or (1,))
    if together > MAX_RANKS:
        raise UsageError(f"--ranks and --tensor-ranks make {together} ranks, each a process; {MAX_RANKS} are the most")
    processes = workers or default_workers(where, together)
    assignments = plan(
        names,
        where,
        workers=processes,
        seed=seed,
        seconds=seconds,
        cases=cases,
        levels=levels,
        dtypes=dtypes,
        poisons=poisons,
        modes=modes,
        stop_at_first=first,
        ranks=tuple(dict.fromkeys(ranks or (1,))),
        tensor_ranks=tuple(dict.fromkeys(tensor_ranks or (1,))),
        without=found_out.without,
    )
    unstored: list[StoreError] = []
    with Screen(names, assignments[0].seconds, cases) as screen:

        def keep(finding: Finding) -> None:
            screen.found(finding)
            try:
                kept.save(finding)
            except StoreError as error:
                # The campaign goes on; the finding is printed at the end in any case.
                unstored.append(error)

        forbidden = [finding_of(limit, names[0], where) for limit in found_out.limits] if strict else []
        for finding in forbidden:
            keep(finding)
        outcome = Pool(assignments, processes, screen.update, keep, seconds).run()
    outcome.findings[:0] = forbidden
    if as_json:
        told = campaign_dict(outcome, where, seed, poisons)
        typer.echo(json.dumps(told | {"limits": [limit.to_dict() for limit in found_out.limits]}))
    else:
        console = results_console()
        console.print(tables.campaign_table(outcome))
        tables.print_limits(console, found_out.limits)
        tables.print_findings(console, outcome.findings, str(store))
        console.print(f"seed {seed}" + (", interrupted" if outcome.interrupted else ""))
    for trouble in (*unstored, *outcome.troubles):
        typer.echo(f"attn-fuzz: {trouble}", err=True)
    idle = [name for name, tally in outcome.tallies.items() if tally.refused and not tally.cases]
    for name in idle:
        refused = outcome.tallies[name].refused
        typer.echo(f"attn-fuzz: {name} took none of the {refused} cases drawn for it, so nothing was tested", err=True)
    raise typer.Exit(2 if unstored or outcome.troubles else 1 if outcome.findings else 2 if idle else 0)


def _found_out(name: str, where: str, dtypes: tuple[str, ...], workers: int | None) -> LimitsFound:
    """What a user's kernel takes of what it declares; told while it is found out."""

    def tell(limit: Limit) -> None:
        progress_console.print(f"limit found: {limit.axis} {limit.how}", markup=False, soft_wrap=True)

    progress_console.print(f"asking what {name} takes", markup=False, soft_wrap=True)
    return infer_limits(name, where, dtypes, workers or default_workers(where), tell)


def _levels(level: list[str] | None, ranks: list[int] | None) -> tuple[str, ...]:
    """Those asked for; of a campaign over ranks only layers, since a kernel call has no ranks."""
    chosen = choices(level, LEVELS, "level")
    if ranks and chosen and max(ranks) > 1 and "layer" not in chosen:
        raise UsageError("a kernel call has no ranks: --ranks and --tensor-ranks spread the cases of --level layer")
    return chosen or (("layer",) if ranks else LEVELS[::-1])


def run(
    backend: BackendOption = None,
    seconds: SecondsOption = None,
    cases: CasesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    level: LevelOption = None,
    dtype: DtypeOption = None,
    ranks: RanksOption = None,
    tensor_ranks: TensorRanksOption = None,
    poison: Annotated[
        list[str] | None, typer.Option(help="nan, finite, or none for memory as it comes. Default: nan and finite.")
    ] = None,
    mode: ModeOption = "case",
    first: FirstOption = False,
    workers: WorkersOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Fuzz backends with the full buffered-K/V layer and at kernel level; what fails is shrunk and stored."""
    where = device_of(device)
    dtypes = choices(dtype, DTYPES, "dtype")
    _fuzz(
        tuple(dict.fromkeys(backend or available_backends(where, dtypes))),
        where,
        seconds=seconds,
        cases=cases,
        seed=seed,
        levels=_levels(level, [*(ranks or ()), *(tensor_ranks or ())]),
        dtypes=dtypes,
        ranks=ranks,
        tensor_ranks=tensor_ranks,
        poisons=choices(poison, (*POISONS, "none"), "poison") or POISONS,
        modes=modes_of(mode),
        first=first,
        workers=workers,
        store=store,
        as_json=as_json,
        named=bool(backend),
    )


def _user_object(name: str, what: str) -> str:
    if ":" not in name or name.startswith(registry.LEGACY):
        raise UsageError(f"{name!r} names no {what.lower()}; use MODULE:{what} or PATH.py:{what}")
    return name


def check(
    kernel: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Or PATH.py:FUNCTION: a varlen kernel.")],
    seconds: SecondsOption = None,
    cases: CasesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    level: LevelOption = None,
    dtype: DtypeOption = None,
    ranks: RanksOption = None,
    tensor_ranks: TensorRanksOption = None,
    mode: ModeOption = "case+batch",
    first: FirstOption = False,
    workers: WorkersOption = None,
    store: StoreOption = DEFAULT_STORE,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fuzz your own kernel, by itself and inside the buffered layer.

    First a few calls find out which dtypes, head dimensions, grouped heads, windows and memory layouts it takes; what
    it does not is listed as a limit, and the campaign goes on without it.
    """
    _fuzz(
        (_user_object(kernel, "FUNCTION"),),
        device_of(device),
        seconds=seconds,
        cases=cases,
        seed=seed,
        levels=_levels(level, [*(ranks or ()), *(tensor_ranks or ())]),
        dtypes=choices(dtype, DTYPES, "dtype"),
        ranks=ranks,
        tensor_ranks=tensor_ranks,
        poisons=POISONS,
        modes=modes_of(mode),
        first=first,
        workers=workers,
        store=store,
        as_json=as_json,
        strict=strict,
    )


def check_layer(
    layer: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="Or PATH.py:CLASS: a buffered attention layer.")],
    seconds: SecondsOption = None,
    cases: CasesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    first: FirstOption = False,
    workers: WorkersOption = None,
    store: StoreOption = DEFAULT_STORE,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fuzz your own attention layer: micro-sequences forward, then backward in reverse (docs/your_layer.md)."""
    _fuzz(
        (registry.USER_LAYER + _user_object(layer, "CLASS"),),
        device_of(device),
        seconds=seconds,
        cases=cases,
        seed=seed,
        levels=("layer",),
        dtypes=choices(dtype, DTYPES, "dtype"),
        ranks=None,
        tensor_ranks=None,
        poisons=POISONS,
        first=first,
        workers=workers,
        store=store,
        as_json=as_json,
        strict=strict,
    )
