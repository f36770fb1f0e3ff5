"""Options that commands share, and what is said when they make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from attn_fuzz.batch.judge import LAUNCHED, SCHEDULE, SELDOM
from attn_fuzz.batch.layer_judge import LAYER_SCHEDULE
from attn_fuzz.campaign.plan import default_device
from attn_fuzz.coverage.aims import AIMS
from attn_fuzz.coverage.axes import ASKED, AXES, Value

DEFAULT_STORE = Path(".attn-fuzz") / "findings"
DEFAULT_SECONDS = 60.0
MODES = ("case", "batch", "packed")

BackendOption = Annotated[
    list[str] | None,
    typer.Option("--backend", "-b", help="Backend to test; repeat for several. Default: all available."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda (all GPUs) or cuda:N. Default: cuda where there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
SecondsOption = Annotated[float | None, typer.Option(min=0.1, help="Wall-clock time. Default: 60.")]
CasesOption = Annotated[int | None, typer.Option(min=1, help="Cases per backend and mode, instead of a time.")]
MinCasesOption = Annotated[
    int, typer.Option(min=0, help="Cases below which a backend counts as not tested (exit status 3).")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the campaign; the same seed draws the same cases.")]
RanksOption = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="Spread layer cases over so many ranks, each a process; repeat to draw from several. Default: 1.",
    ),
]
TensorRanksOption = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="Let so many tensor-parallel ranks share the query heads of each of --ranks, around one K/V head; repeat "
        "to draw from several. Default: 1.",
    ),
]
LevelOption = Annotated[list[str] | None, typer.Option(help="layer or kernel. Default: both.")]
DtypeOption = Annotated[
    list[str] | None, typer.Option(help="fp32, bf16 or fp16; repeat for several. Default: all that a backend takes.")
]
ModeOption = Annotated[
    str,
    typer.Option(
        help="case: one drawn case after another; batch: hundreds of small kernel or layer calls, one by one, judged "
        "together; packed: calls of thousands of documents; several with + between them; both: case+packed; all."
    ),
]
DEFAULT_MODE = "case+batch"
AskOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Ask this of every case beside its budgets, and nothing else, in --mode case, or of every batch in --mode "
        "batch; repeat for several. Such as replayed-alike (CUDA graphs), ordered-by-streams, same-in-company (of "
        "batches: company); a name that is none lists all.",
    ),
]
AimOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="AXIS=VALUE",
        help="Draw only cases with this value of an axis, in every mode, such as gaps=both, max_seqlen=loose or "
        "memory=far_rows; repeat for several, of which those of one axis are alternatives.",
    ),
]
FirstOption = Annotated[bool, typer.Option("--first", help="Stop each backend at its first finding.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes at a time.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="What it declares and does not take is a finding, and no limit.")
]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Folder that the case's own kernel was named in. Default: as the case says, else this one."),
]
StoreOption = Annotated[Path, typer.Option(help="Folder of findings.")]


class UsageError(ValueError):
    """Something that was asked for cannot be; the message is one sentence."""


def device_of(name: str | None) -> str:
    device = name or default_device()
    if device != "cpu" and not (device == "cuda" or (device.startswith("cuda:") and device[5:].isdigit())):
        raise UsageError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UsageError("there is no CUDA device here; use --device cpu")
        if device != "cuda" and int(device[5:]) >= torch.cuda.device_count():
            raise UsageError(f"there is no {device} here, only {torch.cuda.device_count()} CUDA devices")
    return device


def modes_of(name: str) -> tuple[str, ...]:
    several = {"both": ("case", "packed"), "all": MODES}
    chosen = several.get(name, tuple(dict.fromkeys(name.split("+"))))
    if unknown := [part for part in chosen if part not in MODES]:
        known = f"{', '.join(MODES)}, several with + between them, both or all"
        raise UsageError(f"unknown mode {unknown[0]!r}; use {known}")
    return chosen


_NEED_A_GPU: Final = ("replayed alike", "ordered by streams")


def asked_of(ask: list[str] | None, mode: str, device: str) -> dict[str, Any]:
    """Options of a campaign: its modes, and what single cases are asked, or batches."""
    if ask and mode not in (DEFAULT_MODE, "case", "batch"):
        raise UsageError("--ask is about single cases or batches: use it with --mode case or --mode batch")
    known = [each.asked for each in (*SCHEDULE, *LAUNCHED, SELDOM, *LAYER_SCHEDULE)] if mode == "batch" else list(ASKED)
    names = {name.replace(" ", "-"): name for name in known if name}
    asked = tuple(dict.fromkeys(names[each] for each in choices(ask, tuple(names), "question")))
    if device == "cpu" and (without := [name for name in asked if name in _NEED_A_GPU]):
        raise UsageError(f"--ask {without[0].replace(' ', '-')} asks nothing on a CPU; use --device cuda")
    return {"modes": ("case",) if asked and mode == DEFAULT_MODE else modes_of(mode), "asked": asked}


def aim_of(given: list[str] | None) -> tuple[Value, ...]:
    """Values of axes that draws are to have, as they are named on the command line: with dashes for spaces."""
    axes = {name.replace(" ", "-"): name for name in AIMS}
    found: list[Value] = []
    for each in given or ():
        dashed, sign, value = each.partition("=")
        if not sign:
            raise UsageError(f"--aim takes AXIS=VALUE, such as gaps=both, not {each!r}; axes are {', '.join(axes)}")
        if dashed not in axes:
            there = dashed in {axis.name.replace(" ", "-") for axis in AXES}
            why = f"no draw can be aimed at a {dashed}" if there else f"unknown axis {dashed!r}"
            raise UsageError(f"{why}; use {', '.join(axes)}")
        if value not in AIMS[axes[dashed]]:
            raise UsageError(f"no draw can be aimed at {each}; of {dashed} use {', '.join(AIMS[axes[dashed]])}")
        found.append((axes[dashed], value))
    return tuple(dict.fromkeys(found))


def choices(given: list[str] | None, allowed: tuple[str, ...], what: str) -> tuple[str, ...]:
    for value in given or ():
        if value not in allowed:
            raise UsageError(f"unknown {what} {value!r}; use {', '.join(allowed)}")
    return tuple(given or ())
