"""``run``, ``check`` and ``check-layer``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attn_fuzz.backends import registry
from attn_fuzz.campaign.plan import (
    CampaignOptions,
    available_backends,
    default_workers,
)
from attn_fuzz.cli.arguments import (
    DEFAULT_MODE,
    DEFAULT_STORE,
    AimOption,
    AskOption,
    BackendOption,
    CasesOption,
    DeviceOption,
    DtypeOption,
    FirstOption,
    JsonOption,
    LevelOption,
    MinCasesOption,
    ModeOption,
    RanksOption,
    SecondsOption,
    SeedOption,
    StoreOption,
    StrictOption,
    TensorRanksOption,
    UsageError,
    WorkersOption,
    aim_of,
    asked_of,
    choices,
    device_of,
)
from attn_fuzz.cli.campaigns import Told, fuzz
from attn_fuzz.cli.set_option import SetOption, with_arguments
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.reference.case import DTYPES, LEVELS


def _levels(level: list[str] | None, ranks: list[int] | None) -> tuple[str, ...]:
    """Those asked for; of a campaign over ranks only layers, since a kernel call has no ranks."""
    chosen = choices(level, LEVELS, "level")
    if ranks and chosen and max(ranks) > 1 and "layer" not in chosen:
        raise UsageError("a kernel call has no ranks: --ranks and --tensor-ranks spread the cases of --level layer")
    return chosen or (("layer",) if ranks else LEVELS[::-1])


def _spread(where: str, workers: int | None, ranks: list[int] | None, tensor_ranks: list[int] | None) -> dict[str, Any]:
    """Options of a campaign: ranks to draw cases for, and how many cases run at a time."""
    together = max(ranks or (1,)) * max(tensor_ranks or (1,))
    return {
        "workers": workers or default_workers(where, together),
        "ranks": tuple(dict.fromkeys(ranks or (1,))),
        "tensor_ranks": tuple(dict.fromkeys(tensor_ranks or (1,))),
    }


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
    mode: ModeOption = DEFAULT_MODE,
    ask: AskOption = None,
    aim: AimOption = None,
    first: FirstOption = False,
    workers: WorkersOption = None,
    min_cases: MinCasesOption = 1,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Fuzz backends with the full buffered-K/V layer and at kernel level; what fails is shrunk and stored."""
    where = device_of(device)
    dtypes = choices(dtype, DTYPES, "dtype")
    options = CampaignOptions(
        device=where,
        **_spread(where, workers, ranks, tensor_ranks),
        seed=seed,
        seconds=seconds,
        cases=cases,
        levels=_levels(level, [*(ranks or ()), *(tensor_ranks or ())]),
        dtypes=dtypes,
        poisons=choices(poison, (*POISONS, "none"), "poison") or POISONS,
        **asked_of(ask, mode, where),
        aim=aim_of(aim),
        stop_at_first=first,
    )
    names = tuple(dict.fromkeys(backend or available_backends(where, dtypes)))
    fuzz(names, options, Told(store, as_json, min_cases), named=bool(backend))


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
    mode: ModeOption = DEFAULT_MODE,
    ask: AskOption = None,
    aim: AimOption = None,
    first: FirstOption = False,
    workers: WorkersOption = None,
    min_cases: MinCasesOption = 1,
    store: StoreOption = DEFAULT_STORE,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fuzz your own kernel, by itself and inside the buffered layer.

    First a few calls find out which dtypes, head dimensions, grouped heads, windows and memory layouts it takes; what
    it does not is listed as a limit, and the campaign goes on without it. A kernel that compiles is noticed there, and
    drawn from a pool of configurations that grows.
    """
    where = device_of(device)
    options = CampaignOptions(
        device=where,
        **_spread(where, workers, ranks, tensor_ranks),
        seed=seed,
        seconds=seconds,
        cases=cases,
        levels=_levels(level, [*(ranks or ()), *(tensor_ranks or ())]),
        dtypes=choices(dtype, DTYPES, "dtype"),
        **asked_of(ask, mode, where),
        aim=aim_of(aim),
        stop_at_first=first,
    )
    fuzz((_user_object(kernel, "FUNCTION"),), options, Told(store, as_json, min_cases, strict))


def check_layer(
    layer: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="Or PATH.py:CLASS: a buffered attention layer.")],
    set_: SetOption = None,
    seconds: SecondsOption = None,
    cases: CasesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    ranks: RanksOption = None,
    tensor_ranks: TensorRanksOption = None,
    mode: ModeOption = DEFAULT_MODE,
    ask: AskOption = None,
    first: FirstOption = False,
    workers: WorkersOption = None,
    min_cases: MinCasesOption = 1,
    store: StoreOption = DEFAULT_STORE,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fuzz your own attention layer: micro-sequences forward, then backward in reverse (docs/your_layer.md).

    With --ranks cases are spread over processes; a class that declares ranks is handed their process group.
    """
    where = device_of(device)
    options = CampaignOptions(
        device=where,
        **_spread(where, workers, ranks, tensor_ranks),
        seed=seed,
        seconds=seconds,
        cases=cases,
        levels=("layer",),
        dtypes=choices(dtype, DTYPES, "dtype"),
        **asked_of(ask, mode, where),
        stop_at_first=first,
    )
    name = with_arguments(_user_object(layer, "CLASS"), set_)
    fuzz((registry.USER_LAYER + name,), options, Told(store, as_json, min_cases, strict))
