"""Who does what: backends and shards to assignments, so that every core has work and time is shared evenly."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign.messages import Assignment, CampaignError
from attn_fuzz.coverage.aims import Aims
from attn_fuzz.coverage.allowed import Space
from attn_fuzz.coverage.axes import Value
from attn_fuzz.execution.poison import POISONS

MAX_CUDA_WORKERS = 16
"""Processes that share one GPU: beyond this they only wait for one another."""

LEAST_SHARE: Final = 0.5
"""Of the time that an assignment was planned for: it gets so much even where others took longer."""

_COMPILERS: Final = 4
"""Processes that compile ahead for one worker, where there are cores for them: a first few configurations each have one
at once."""

STARTING: Final = 1.0
"""Seconds that a process takes until its first case, as long as none has shown it here."""

WEIGHTS: Final = {"case": 1, "batch": 4, "packed": 4}
"""What part of a backend's time each mode gets: a single case that is asked everything takes as long as some twenty
calls of a batch, and what those miss is mostly found by the first dozens."""


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def kind_of(device: str) -> str:
    """``cpu`` or ``cuda``."""
    return device.partition(":")[0]


def available_backends(device: str, dtypes: Sequence[str] = ()) -> tuple[str, ...]:
    """Kernels that run on this device here and take one of the dtypes, where some are given."""
    kernels = {name: registry.load(name).kernel for name in registry.backend_names()}
    return tuple(
        name
        for name, kernel in kernels.items()
        if kernel.why_unavailable(kind_of(device)) is None
        and (not dtypes or set(dtypes) & set(kernel.capabilities_on(kind_of(device)).dtypes))
    )


def require_available(names: Sequence[str], device: str, dtypes: Sequence[str] = ()) -> None:
    """Checks backends before anything starts.

    Raises:
        UnknownBackend: for a name that does not exist.
        BackendUnavailable: for one that cannot run on the device here, or takes none of the dtypes.
    """
    for name in names:
        kernel = registry.load(name).kernel
        if (reason := kernel.why_unavailable(kind_of(device))) is not None:
            raise BackendUnavailable(f"backend {name} cannot run on {device} here: {reason}")
        taken = kernel.capabilities_on(kind_of(device)).dtypes
        if dtypes and not set(dtypes) & set(taken):
            raise BackendUnavailable(f"backend {name} takes {', '.join(taken)}, but none of {', '.join(dtypes)}")


def batched_levels(
    backend: Backend, levels: Sequence[str], ranks: Sequence[int] = (1,), tensor_ranks: Sequence[int] = (1,)
) -> list[str]:
    """The levels of a campaign at which a backend's calls come in batches, of layers on one rank or over several.

    Layers do not without a backward, or whose gradient rows say nothing of other cuts, or which leave out the padding
    that calls of a batch end in, or around a kernel that compiles for shapes.
    """
    alone, stated = max(ranks) * max(tensor_ranks) == 1, backend.kernel.capabilities
    spread = alone or backend.rank_layer is not None
    whole = backend.goes_back(stated.devices[0]) and stated.gradient_rows == "kept" and stated.padding == "computed"
    layers = spread and whole and not stated.layouts
    return [level for level in levels if level in backend.levels and (layers or level == "kernel")]


def takes_batches(
    name: str,
    levels: Sequence[str],
    ranks: Sequence[int] = (1,),
    tensor_ranks: Sequence[int] = (1,),
    without: Mapping[str, Any] | None = None,
) -> bool:
    """Whether a campaign calls a backend's kernel, or its layer on one rank."""
    backend = registry.narrowed(registry.load(name), without or {})
    return bool(batched_levels(backend, levels, ranks, tensor_ranks))


def default_workers(device: str, ranks: int = 1) -> int:
    """Workers at a time, each of which has so many rank processes beside it where there are more than one.

    A worker and its ranks take turns, so that there is room for about two of them on the cores that one of them fills.
    """
    cores = os.cpu_count() or 1
    if ranks > 1:
        cores = min(cores, math.ceil(2 * cores / (ranks + 1)))
    if not device.startswith("cuda"):
        return cores
    return max(1, min(cores, MAX_CUDA_WORKERS * len(devices_in_turn(device)) // ranks))


def devices_in_turn(device: str) -> tuple[str, ...]:
    """All GPUs for ``cuda``; otherwise the device itself."""
    if device == "cuda" and torch.cuda.device_count() > 1:
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    return (device,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CampaignOptions:
    """What a campaign is asked for."""

    device: str
    """``cpu``, ``cuda`` (all GPUs in turn) or ``cuda:N``."""
    workers: int
    """Processes at a time."""
    seed: int = 0
    """Of the campaign; every shard derives its own."""
    seconds: float | None = None
    """Wall-clock time of the whole campaign."""
    cases: int | None = None
    """Per backend, all shards together."""
    levels: tuple[str, ...] = ("layer", "kernel")
    dtypes: tuple[str, ...] = ()
    """To draw from; none for all."""
    poisons: tuple[str, ...] = POISONS
    """Memory contents to run every case under."""
    modes: tuple[str, ...] = ("case",)
    """``case``, ``batch``, ``packed``; each backend has workers of its own for each, batches only where it takes any
    drawn call."""
    asked: tuple[str, ...] = ()
    """What every single case is asked beside its budgets, or every batch; none for some of all, in turn."""
    stop_at_first: bool = False
    """End each assignment with its first finding."""
    ranks: tuple[int, ...] = (1,)
    """To draw layer cases for."""
    tensor_ranks: tuple[int, ...] = (1,)
    """That share the query heads of each of them."""
    aim: tuple[Value, ...] = ()
    """What all draws are to have, of several values of one axis any."""


def aims_of(name: str, options: CampaignOptions, without: Mapping[str, Any] | None = None) -> Aims:
    """What a campaign's draws of a backend are to have.

    Args:
        name: of the backend.
        options: what is asked for.
        without: of a user's backend: capabilities as they were found out.
    """
    o, backend = options, registry.narrowed(registry.load(name), without or {})
    batched = batched_levels(backend, o.levels, o.ranks, o.tensor_ranks)
    space = Space.of(backend, kind_of(o.device), batched, o.dtypes)
    return Aims(space, o.aim, tuple(level for level in o.levels if level in backend.levels))


def plan(names: Sequence[str], options: CampaignOptions, without: Mapping[str, Any] | None = None) -> list[Assignment]:
    """Assignments for all backends.

    Args:
        names: backends.
        options: what is asked for.
        without: of a user's backend: capabilities as they were found out.

    Raises:
        CampaignError: where no backend has a case with what is aimed at.
    """
    o = options
    aims = {name: aims_of(name, o, without) for name in names} if o.aim else {}
    jobs = [
        (name, mode)
        for mode in o.modes
        for name in names
        if mode != "batch" or takes_batches(name, o.levels, o.ranks, o.tensor_ranks, without)
        if not aims or aims[name].levels_in(mode)
    ]
    if aims and not jobs:
        raise CampaignError("no backend has a case with what is aimed at")
    places = {job: o.workers / len(names) * share for job, share in _shares(jobs).items()}
    shards = _shards(places, o)
    # Groups of ranks that have a GPU each begin where others end.
    devices = devices_in_turn(o.device)[:: max(o.ranks) * max(o.tensor_ranks)]
    running = min(sum(shards.values()), o.workers)
    spare = max(0, (os.cpu_count() or 1) - running) // running
    # Where cases run on the CPU, too, compilers without a core of their own would take it from them.
    compilers = max(kind_of(o.device) == "cuda", min(_COMPILERS, spare))
    made = [
        Assignment(
            backend=name,
            device=devices[(shard * len(jobs) + index) % len(devices)],
            seed=o.seed * 1009 + shard * len(jobs) + index,
            levels=aims[name].levels_in(mode) if aims else o.levels,
            dtypes=o.dtypes,
            cases=None if o.cases is None else o.cases // count + (shard < o.cases % count),
            seconds=None if o.seconds is None else o.seconds * min(1.0, places[name, mode] / count),
            poisons=o.poisons,
            mode=mode,
            asked=o.asked,
            stop_at_first=o.stop_at_first,
            ranks=o.ranks,
            tensor_ranks=o.tensor_ranks,
            compilers=compilers,
            without=dict(without or {}),
            aim=aims[name].raw if aims else {},
            compile_aimed=bool(aims),
        )
        for shard in range(max(shards.values()))
        for index, (name, mode) in enumerate(jobs)
        if shard < (count := shards[name, mode])
    ]
    # The longest first, so that short ones fill what is left in the end.
    return sorted(made, key=lambda job: -(job.seconds or 0.0))


Job = tuple[str, str]
"""A backend and a mode."""


def _shares(jobs: Sequence[Job]) -> dict[Job, float]:
    """Of its backend's time, what each mode gets."""
    totals = {name: sum(WEIGHTS[mode] for other, mode in jobs if other == name) for name, _ in jobs}
    return {(name, mode): WEIGHTS[mode] / totals[name] for name, mode in jobs}


def _shards(places: Mapping[Job, float], o: CampaignOptions) -> dict[Job, int]:
    """How many processes share each job's work.

    Where there is a place for every job all of the time, as many as it has places; else they follow one another there,
    and so many of each that no place is without work.

    Args:
        places: how many workers' time each job has.
        o: what is asked for.
    """
    whole = {job: max(1, round(count)) for job, count in places.items()}
    if sum(whole.values()) > o.workers:
        backends = len({name for name, _ in places})
        whole = dict.fromkeys(places, max(1, o.workers // (len(places) if o.seconds is None else backends)))
    most = len(places) * o.workers if o.cases is None else max(1, o.cases // 50)
    return {job: min(count, most) for job, count in whole.items()}


def share_of_time(planned: Sequence[float], busy: Sequence[float], left: float, starting: float | None) -> float:
    """Seconds for an assignment that is about to start, so that starting processes does not make a campaign longer.

    What is left is shared as it was planned; one that nothing follows in its place has it until the end.

    Args:
        planned: seconds that it was given before others had taken theirs, and those of what will have to follow.
        busy: seconds for which each of the other places is taken; 0 for one that is free.
        left: of the campaign's time.
        starting: seconds that a process has been seen to take until its first case, which do not count as its share.
    """
    if starting is None:
        # A single round is not shortened before a process has been seen to start slowly.
        starting = STARTING if len(planned) > 1 + busy.count(0.0) else 0.0
    # As if no place was ever free; then less, until all of them end in time.
    scale = ((1 + len(busy)) * left - sum(busy) - len(planned) * starting) / max(sum(planned), 1e-9)
    while scale > LEAST_SHARE:
        ends, followed = _ends([starting + scale * each for each in planned], busy)
        if max(ends) <= left + 1e-6:
            break
        scale *= 0.99
    else:
        ends, followed = _ends([starting + LEAST_SHARE * each for each in planned], busy)
    share = min(planned[0] * scale, left - starting) if followed else left - starting
    return max(share, planned[0] * LEAST_SHARE)


def _ends(times: Sequence[float], busy: Sequence[float]) -> tuple[list[float], bool]:
    """When each place is free again, and whether something follows the first in its place.

    Args:
        times: what each takes; the first begins in a place of its own, the others wherever one is free first.
        busy: how long the other places are taken.
    """
    ends, followed = [times[0], *busy], False
    for each in times[1:]:
        place = ends.index(min(ends))
        followed |= place == 0
        ends[place] += each
    return ends, followed
