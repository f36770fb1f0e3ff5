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
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.execution.poison import POISONS

MAX_CUDA_WORKERS = 16
"""Processes that share one GPU: beyond this they only wait for one another."""

LEAST_SHARE: Final = 0.5
"""Of the time that an assignment was planned for: it gets so much even where others took longer."""

_COMPILERS: Final = 4
"""Processes that compile ahead for one worker, where there are cores for them: a first few configurations each have one
at once."""

STARTING: Final = 3.0
"""Seconds that a process takes until its first case, as long as none has shown it here."""


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _kind(device: str) -> str:
    return device.partition(":")[0]


def available_backends(device: str, dtypes: Sequence[str] = ()) -> tuple[str, ...]:
    """Kernels that run on this device here and take one of the dtypes, where some are given."""
    kernels = {name: registry.load(name).kernel for name in registry.backend_names()}
    return tuple(
        name
        for name, kernel in kernels.items()
        if kernel.why_unavailable(_kind(device)) is None
        and (not dtypes or set(dtypes) & set(kernel.capabilities_on(_kind(device)).dtypes))
    )


def require_available(names: Sequence[str], device: str, dtypes: Sequence[str] = ()) -> None:
    """Checks backends before anything starts.

    Raises:
        UnknownBackend: for a name that does not exist.
        BackendUnavailable: for one that cannot run on the device here, or takes none of the dtypes.
    """
    for name in names:
        kernel = registry.load(name).kernel
        if (reason := kernel.why_unavailable(_kind(device))) is not None:
            raise BackendUnavailable(f"backend {name} cannot run on {device} here: {reason}")
        taken = kernel.capabilities_on(_kind(device)).dtypes
        if dtypes and not set(dtypes) & set(taken):
            raise BackendUnavailable(f"backend {name} takes {', '.join(taken)}, but none of {', '.join(dtypes)}")


def batched_levels(
    backend: Backend, levels: Sequence[str], ranks: Sequence[int] = (1,), tensor_ranks: Sequence[int] = (1,)
) -> list[str]:
    """The levels of a campaign at which a backend's calls come in batches: what is spread over ranks does not.

    Nor do layers without a backward, or whose gradient rows say nothing of other cuts, or which leave out the padding
    that calls of a batch end in, or around a kernel that compiles for shapes.
    """
    alone, stated = max(ranks) * max(tensor_ranks) == 1, backend.kernel.capabilities
    whole = stated.backward and stated.gradient_rows == "kept" and stated.padding == "computed"
    layers = alone and whole and not stated.layouts
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
    stop_at_first: bool = False
    """End each assignment with its first finding."""
    ranks: tuple[int, ...] = (1,)
    """To draw layer cases for."""
    tensor_ranks: tuple[int, ...] = (1,)
    """That share the query heads of each of them."""


def plan(names: Sequence[str], options: CampaignOptions, without: Mapping[str, Any] | None = None) -> list[Assignment]:
    """Assignments for all backends.

    Args:
        names: backends.
        options: what is asked for.
        without: of a user's backend: capabilities as they were found out.
    """
    o = options
    jobs = [
        (name, mode)
        for mode in o.modes
        for name in names
        if mode != "batch" or takes_batches(name, o.levels, o.ranks, o.tensor_ranks, without)
    ]
    shards = max(1, o.workers // len(jobs))
    if o.cases is not None:
        shards = min(shards, max(1, o.cases // 50))
    # With more backends than workers, each gets its share of the time.
    share = None if o.seconds is None else o.seconds * min(1.0, o.workers / (len(jobs) * shards))
    # Groups of ranks that have a GPU each begin where others end.
    places = devices_in_turn(o.device)[:: max(o.ranks) * max(o.tensor_ranks)]
    count = len(jobs) * shards
    spare = max(0, (os.cpu_count() or 1) - count) // count
    # Where cases run on the CPU, too, compilers without a core of their own would take it from them.
    compilers = max(_kind(o.device) == "cuda", min(_COMPILERS, spare))
    return [
        Assignment(
            backend=name,
            device=places[(shard * len(jobs) + index) % len(places)],
            seed=o.seed * 1009 + shard * len(jobs) + index,
            levels=o.levels,
            dtypes=o.dtypes,
            cases=None if o.cases is None else o.cases // shards + (shard < o.cases % shards),
            seconds=share,
            poisons=o.poisons,
            mode=mode,
            stop_at_first=o.stop_at_first,
            ranks=o.ranks,
            tensor_ranks=o.tensor_ranks,
            compilers=compilers,
            without=dict(without or {}),
        )
        for shard in range(shards)
        for index, (name, mode) in enumerate(jobs)
    ]


def share_of_time(planned: float, left: float, waiting: int, workers: int, starting: float | None) -> float:
    """Seconds for an assignment that is about to start, so that starting processes does not make a campaign longer.

    Args:
        planned: seconds that it was given before others had taken theirs.
        left: of the campaign's time.
        waiting: assignments that will have to follow.
        workers: at a time.
        starting: seconds that a process has been seen to take until its first case, which do not count as its share.
    """
    rounds = math.ceil((1 + waiting) / workers)
    if starting is None:
        # A single round is not shortened before a process has been seen to start slowly.
        starting = STARTING if waiting else 0.0
    return max(left / rounds - starting, planned * LEAST_SHARE)
