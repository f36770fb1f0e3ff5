"""``replay`` and ``save``: single cases, from and to disk."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Final

import typer

from attn_fuzz.backends import registry
from attn_fuzz.campaign.plan import available_backends, require_available
from attn_fuzz.campaign.replay import verdict_on
from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import (
    DEFAULT_STORE,
    BackendOption,
    DeviceOption,
    JsonOption,
    RootOption,
    StoreOption,
    UsageError,
    device_of,
)
from attn_fuzz.cli.terminal import results_console
from attn_fuzz.execution.process import set_up_process
from attn_fuzz.findings.regression_cases import REGRESSIONS, RegressionCase, find_regression_case
from attn_fuzz.oracle.examine import Verdict

NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""Names that regression cases may have: each is a file's name and a test's."""


def place_of(device: str | None, saved: RegressionCase) -> str:
    """The device asked for, else the one to try a case on: where there is a GPU that, unless it failed on CPUs only."""
    return device_of("cpu" if device is None and set(saved.failing) == {"cpu"} else device)


def replay(
    case: Annotated[
        str, typer.Argument(help="A CASE.json file, a finding's id, a regression case's name, or a case as JSON text.")
    ],
    backend: BackendOption = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one saved case and show every check's verdict.

    Default backends: a finding's own, else all available. Default device: the CPU for what was found on CPUs only, else
    cuda where there is one.
    """
    saved = find_regression_case(case, store).from_anywhere(root)
    where = place_of(device, saved)
    own = saved.failing.get(where.partition(":")[0], ())
    names = tuple(dict.fromkeys(backend or own or available_backends(where)))
    require_available(names, where)
    set_up_process(where)
    results = [(name, verdict_on(saved, name, where)) for name in names]
    if backend and all(isinstance(verdict, str) for _, verdict in results):
        raise UsageError("; ".join(str(verdict) for _, verdict in results))
    failed = [name for name, verdict in results if isinstance(verdict, Verdict) and verdict.symptoms]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "case": saved.case.to_dict(),
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
        console = results_console()
        tables.verdict_lines(console, saved.case, results)
        if saved.sequence is not None:
            tables.call_sequence_lines(console, saved.sequence)
    raise typer.Exit(1 if failed else 0)


def save(
    case: Annotated[str, typer.Argument(help="A CASE.json file, a finding's id, or a case as JSON text.")],
    name: Annotated[str, typer.Argument(help="Name of the regression case.")],
    about: Annotated[str, typer.Option(help="Why it is kept.")] = "",
    expect_failure: Annotated[
        list[str] | None,
        typer.Option(help="Known-bad control that must fail it; repeat for several."),
    ] = None,
    device: DeviceOption = None,
    folder: Annotated[Path, typer.Option(help="Folder of regression cases.")] = REGRESSIONS,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Keep a failing case as a regression case, a test that passes once its backend is mended."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a regression case; use letters, digits, '-', '_' and '.'")
    found = find_regression_case(case, store)
    for backend in expect_failure or ():
        registry.load(backend)
    kind = device_of(device).partition(":")[0]
    controls = {kind: tuple(expect_failure)} if expect_failure else found.expected_failures
    saved = dataclasses.replace(found, name=name, about=about or found.about, expected_failures=controls)
    target = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); choose another with --folder") from None
    try:
        with target.open("x") as file:
            file.write(saved.to_json(folder))
    except FileExistsError:
        raise UsageError(f"{target} exists already; choose another name") from None
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another --folder") from None
    typer.echo(f"{target}: replay with python -m attn_fuzz replay {name}")
