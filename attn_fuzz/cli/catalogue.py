"""``backends``: what there is, and what it takes when asked."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from attn_fuzz.backends import registry
from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import BackendOption, JsonOption, UsageError, WorkersOption, device_of
from attn_fuzz.cli.terminal import results_console
from attn_fuzz.evaluation.capability_probe import Answer, Probing
from attn_fuzz.execution.environment import environment

Availability = tuple[str, str, str | None]
"""(backend, device, why it is not available or None)."""


def _availability(names: tuple[str, ...], places: tuple[str, ...]) -> list[Availability]:
    return [(name, place, registry.load(name).kernel.why_unavailable(place)) for name in names for place in places]


def _listed(rows: list[Availability]) -> list[dict[str, object]]:
    """One JSON object per backend."""
    listed = []
    for name in dict.fromkeys(name for name, _, _ in rows):
        reasons = {place: reason for other, place, reason in rows if other == name}
        usable = [place for place, reason in reasons.items() if reason is None]
        listed.append(
            {
                "name": name,
                "available": bool(usable),
                "reason": None if usable else "; ".join(str(reason) for reason in dict.fromkeys(reasons.values())),
                "devices": usable,
                # JSON has no infinity.
                "capabilities": {
                    key: str(value) if isinstance(value, float) else value
                    for key, value in vars(registry.load(name).kernel.capabilities).items()
                },
            }
        )
    return listed


def _tell(name: str, answer: Answer) -> None:
    mark = "DIFFERS " if answer.differs else ""
    typer.echo(f"{name}: {answer.probe}: {mark}{answer.measured}", err=True)


def backends(
    backend: BackendOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: both.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also run one case per capability, and show where statements are wrong.")
    ] = False,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is available here, what each backend supports, and why the rest is not available."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; use cpu or cuda")
    names = tuple(dict.fromkeys(backend or registry.backend_names()))
    rows = _availability(names, (device,) if device else ("cpu", "cuda"))
    console = results_console()
    if not probe:
        if as_json:
            typer.echo(json.dumps({"backends": _listed(rows)}))
        else:
            tables.print_backends(console, rows)
        return
    place = device_of(device)
    usable = [name for name, where, reason in rows if where == place and reason is None]
    probing = Probing(place, _tell)
    probing.ask(usable, workers or os.cpu_count() or 1)
    if not as_json:
        tables.print_probes(console, probing.answers)
        _end(probing)
        return
    listed = _listed([row for row in rows if row[1] == place])
    for entry in listed:
        answers = probing.answers.get(str(entry["name"]), [])
        entry["probes"] = [{"probe": a.probe, "stated": a.stated, "measured": a.measured} for a in answers]
    told = {"environment": environment(place), "device": place, "interrupted": probing.interrupted, "backends": listed}
    typer.echo(json.dumps(told))
    _end(probing)


def _end(probing: Probing) -> None:
    """Ends as an interrupted command does, where it was."""
    if probing.interrupted:
        typer.echo("interrupted: what is missing was not asked", err=True)
        raise typer.Abort
