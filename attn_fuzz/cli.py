"""The command line. Exit status: 0 nothing found, 1 findings, 2 bad usage or an environment that cannot do it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attn_fuzz import show
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.plan import available_backends, default_device, default_workers, plan, require_available
from attn_fuzz.campaign.pool import CampaignError, Outcome, Pool
from attn_fuzz.campaign.worker import set_up_process
from attn_fuzz.cases_on_disk import REGRESSIONS, Seed, find_seed
from attn_fuzz.environment import environment
from attn_fuzz.examine import Verdict, examine
from attn_fuzz.findings import Finding, FindingError
from attn_fuzz.poison import POISONS
from attn_fuzz.store import Store, StoreError
from backends import registry
from backends.kernel import BackendUnavailable, UnsupportedCase
from reference.case import DTYPES, LEVELS, Case, CaseError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Differential correctness tests and fuzzing for packed attention with a buffered K/V cache.",
)

DEFAULT_STORE = Path(".attn-fuzz") / "findings"
DEFAULT_SECONDS = 60.0

_progress_console = Console(stderr=True, emoji=False)

BackendOption = Annotated[
    list[str] | None,
    typer.Option("--backend", "-b", help="Backend to test; repeat for several. Default: all available."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda (all GPUs) or cuda:N. Default: cuda where there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
SecondsOption = Annotated[float | None, typer.Option(min=0.1, help="Wall-clock time. Default: 60.")]
CasesOption = Annotated[int | None, typer.Option(min=1, help="Cases per backend, instead of a time.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the campaign; the same seed draws the same cases.")]
LevelOption = Annotated[list[str] | None, typer.Option(help="layer or kernel. Default: both.")]
DtypeOption = Annotated[
    list[str] | None, typer.Option(help="fp32, bf16 or fp16; repeat for several. Default: all that a backend takes.")
]
FirstOption = Annotated[bool, typer.Option("--first", help="Stop each backend at its first finding.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes at a time.")]
StoreOption = Annotated[Path, typer.Option(help="Folder of findings.")]


class UsageError(ValueError):
    """Something that was asked for cannot be; the message is one sentence."""


def _device(name: str | None) -> str:
    device = name or default_device()
    if device != "cpu" and not (device == "cuda" or (device.startswith("cuda:") and device[5:].isdigit())):
        raise UsageError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UsageError("there is no CUDA device here; use --device cpu")
        if device != "cuda" and int(device[5:]) >= torch.cuda.device_count():
            raise UsageError(f"there is no {device} here, only {torch.cuda.device_count()} CUDA devices")
    return device


def _choices(given: list[str] | None, allowed: tuple[str, ...], what: str) -> tuple[str, ...]:
    for value in given or ():
        if value not in allowed:
            raise UsageError(f"unknown {what} {value!r}; use {', '.join(allowed)}")
    return tuple(given or ())


class _Screen:
    """Progress on standard error, one line per backend."""

    def __init__(self, names: tuple[str, ...], seconds: float | None, cases: int | None) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.fields[cases]} cases, {task.fields[documents]} documents, {task.fields[found]} findings"),
            TimeElapsedColumn(),
            console=_progress_console,
        )
        self._by_cases = cases is not None
        total = float(cases) if cases is not None else seconds
        self._tasks = {
            name: self._progress.add_task(name, total=total, cases=0, documents=0, found=0) for name in names
        }
        self._found = dict.fromkeys(names, 0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, tallies: dict[str, Tally]) -> None:
        for name, tally in tallies.items():
            done = float(tally.cases) if self._by_cases else tally.seconds
            self._progress.update(
                self._tasks[name],
                completed=done,
                cases=tally.cases,
                documents=tally.documents,
                found=self._found[name],
            )

    def found(self, finding: Finding) -> None:
        self._found[finding.backend] += 1
        self._progress.console.print(
            f"{finding.symptom} on {finding.backend}: {finding.case.to_json()}", markup=False, soft_wrap=True
        )


def campaign_dict(outcome: Outcome, device: str, seed: int, poisons: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a campaign."""
    return {
        "cases": sum(tally.cases for tally in outcome.tallies.values()),
        "documents": sum(tally.documents for tally in outcome.tallies.values()),
        "seconds": round(outcome.seconds, 3),
        "seed": seed,
        "poisons": list(poisons),
        "interrupted": outcome.interrupted,
        "environment": environment(device),
        "backends": {
            name: {
                "cases": tally.cases,
                "documents": tally.documents,
                "straddling": tally.straddling,
                "refused": tally.refused,
                "repeated": tally.repeated,
                "by_kind": dict(sorted(tally.by_kind.items())),
                "paths": tally.paths,
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
    poisons: tuple[str, ...],
    first: bool,
    workers: int | None,
    store: Path,
    as_json: bool,
) -> None:
    """A campaign from assignments to exit status."""
    if seconds is not None and cases is not None:
        raise UsageError("--seconds and --cases exclude each other")
    require_available(names, where, dtypes)
    kept = Store(store)
    if cases is None and seconds is None:
        seconds = DEFAULT_SECONDS
    processes = workers or default_workers(where)
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
        stop_at_first=first,
    )
    unstored: list[StoreError] = []
    with _Screen(names, assignments[0].seconds, cases) as screen:

        def keep(finding: Finding) -> None:
            screen.found(finding)
            try:
                kept.save(finding)
            except StoreError as error:
                # The campaign goes on; the finding is printed at the end in any case.
                unstored.append(error)

        outcome = Pool(assignments, processes, screen.update, keep).run()
    if as_json:
        typer.echo(json.dumps(campaign_dict(outcome, where, seed, poisons)))
    else:
        console = Console(emoji=False)
        console.print(show.campaign_table(outcome))
        show.print_findings(console, outcome.findings, str(store))
        console.print(f"seed {seed}" + (", interrupted" if outcome.interrupted else ""))
    for error in unstored:
        typer.echo(f"attn-fuzz: {error}", err=True)
    raise typer.Exit(2 if unstored else 1 if outcome.findings else 0)


@app.command()
def run(
    backend: BackendOption = None,
    seconds: SecondsOption = None,
    cases: CasesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    level: LevelOption = None,
    dtype: DtypeOption = None,
    poison: Annotated[
        list[str] | None, typer.Option(help="nan, finite, or none for memory as it comes. Default: nan and finite.")
    ] = None,
    first: FirstOption = False,
    workers: WorkersOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Fuzz backends with the full buffered-K/V layer and at kernel level; what fails is shrunk and stored."""
    where = _device(device)
    dtypes = _choices(dtype, DTYPES, "dtype")
    _fuzz(
        tuple(dict.fromkeys(backend or available_backends(where, dtypes))),
        where,
        seconds=seconds,
        cases=cases,
        seed=seed,
        levels=_choices(level, LEVELS, "level") or LEVELS[::-1],
        dtypes=dtypes,
        poisons=_choices(poison, (*POISONS, "none"), "poison") or POISONS,
        first=first,
        workers=workers,
        store=store,
        as_json=as_json,
    )


@app.command()
def check(
    kernel: Annotated[
        str, typer.Argument(help="MODULE:FUNCTION or PATH.py:FUNCTION, with the usual varlen signature.")
    ],
    seconds: SecondsOption = None,
    cases: CasesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    level: LevelOption = None,
    dtype: DtypeOption = None,
    first: FirstOption = False,
    workers: WorkersOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Fuzz your own kernel, by itself and inside the buffered layer."""
    if ":" not in kernel or kernel.startswith(registry.LEGACY):
        raise UsageError(f"{kernel!r} names no function; use MODULE:FUNCTION or PATH.py:FUNCTION")
    _fuzz(
        (kernel,),
        _device(device),
        seconds=seconds,
        cases=cases,
        seed=seed,
        levels=_choices(level, LEVELS, "level") or LEVELS[::-1],
        dtypes=_choices(dtype, DTYPES, "dtype"),
        poisons=POISONS,
        first=first,
        workers=workers,
        store=store,
        as_json=as_json,
    )


def _verdict(name: str, case: Case, device: str) -> Verdict | str:
    try:
        return examine(case, registry.load(name), device)
    except UnsupportedCase as refusal:
        return str(refusal)


@app.command()
def replay(
    case: Annotated[str, typer.Argument(help="A CASE.json file, a finding's id, or the name of a regression seed.")],
    backend: BackendOption = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Run one saved case and show every check's verdict. Default backends: a finding's own, else all available."""
    where = _device(device)
    seed = find_seed(case, store)
    own = seed.convicts.get(where.partition(":")[0], ())
    names = tuple(dict.fromkeys(backend or own or available_backends(where)))
    require_available(names, where)
    set_up_process(where)
    results = [(name, _verdict(name, seed.case, where)) for name in names]
    if backend and all(isinstance(verdict, str) for _, verdict in results):
        raise UsageError("; ".join(str(verdict) for _, verdict in results))
    failed = [name for name, verdict in results if isinstance(verdict, Verdict) and verdict.symptoms]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "case": seed.case.to_dict(),
                    "device": where,
                    "backends": [
                        {"name": name, "refused": verdict}
                        if isinstance(verdict, str)
                        else {
                            "name": name,
                            "checks": list(verdict.checks),
                            "messages": [str(symptom) for symptom in verdict.symptoms],
                            "worst_z": {
                                tensor: z if z < float("inf") else "inf" for tensor, z in verdict.worst_z.items()
                            },
                            "paths": sorted(verdict.paths),
                        }
                        for name, verdict in results
                    ],
                }
            )
        )
    else:
        show.verdict_lines(Console(emoji=False), seed.case, results)
    raise typer.Exit(1 if failed else 0)


@app.command()
def save(
    case: Annotated[str, typer.Argument(help="A CASE.json file, a finding's id, or a case as JSON text.")],
    name: Annotated[str, typer.Argument(help="Name of the regression seed.")],
    about: Annotated[str, typer.Option(help="Why it is kept.")] = "",
    convict: Annotated[list[str] | None, typer.Option(help="Backend that must fail it; repeat for several.")] = None,
    device: DeviceOption = None,
    folder: Annotated[Path, typer.Option(help="Folder of regression seeds.")] = REGRESSIONS,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Keep a failing case as a regression seed, which the test suite collects by itself."""
    found = Seed(name, Case.from_json(case)) if case.lstrip().startswith("{") else find_seed(case, store)
    convicts = {_device(device).partition(":")[0]: tuple(convict)} if convict else found.convicts
    seed = Seed(name, found.case, about or found.about, convicts)
    target = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with target.open("x") as file:
            file.write(seed.to_json())
    except FileExistsError:
        raise UsageError(f"{target} exists already; choose another name") from None
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None
    typer.echo(f"{target}: replay with python -m attn_fuzz replay {name}")


@app.command()
def backends(
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: both.")] = None, as_json: JsonOption = False
) -> None:
    """What is available here, what each backend supports, and why the rest is not available."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; use cpu or cuda")
    places = (device,) if device else ("cpu", "cuda")
    rows = [
        (name, place, registry.load(name).kernel.why_unavailable(place))
        for name in registry.kernel_names()
        for place in places
    ]
    if not as_json:
        Console(emoji=False).print(show.backends_table(rows))
        return
    listed = []
    for name in registry.kernel_names():
        reasons = {place: reason for other, place, reason in rows if other == name}
        usable = [place for place, reason in reasons.items() if reason is None]
        capabilities = registry.load(name).kernel.capabilities
        listed.append(
            {
                "name": name,
                "available": bool(usable),
                "reason": None if usable else "; ".join(str(reason) for reason in dict.fromkeys(reasons.values())),
                "devices": usable,
                "capabilities": dict(vars(capabilities)),
            }
        )
    typer.echo(json.dumps({"backends": listed}))


_ONE_SENTENCE = (
    UsageError,
    CaseError,
    FindingError,
    StoreError,
    CampaignError,
    BackendUnavailable,
    registry.UnknownBackend,
)


def main() -> None:
    """Entry point: every expected error is one sentence on standard error and exit status 2."""
    # Read by cuBLAS when it starts; without it repeatable matrix products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        app()
    except _ONE_SENTENCE as error:
        typer.echo(f"attn-fuzz: {error}", err=True)
        sys.exit(2)
