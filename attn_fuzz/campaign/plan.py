"""Who does what: backends and shards to assignments, so that every core has work and time is shared evenly."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.generation.calls import compiles_for_calls

MAX_CUDA_WORKERS = 16
"""Processes that share one GPU: beyond this they only wait for one another."""

LEAST_SHARE: Final = 0.5
"""Of the time that an assignment was planned for, whatever others took."""

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


def takes_batches(name: str, levels: Sequence[str], device: str) -> bool:
    """Whether a campaign of these levels calls a backend's kernel by itself, and may call it with whatever is drawn."""
    backend = registry.load(name)
    compiles = compiles_for_calls(backend.kernel.capabilities_on(_kind(device)))
    return "kernel" in levels and "kernel" in backend.levels and not compiles


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


def plan(
    names: Sequence[str],
    device: str,
    *,
    workers: int,
    seed: int,
    seconds: float | None,
    cases: int | None,
    levels: Sequence[str],
    dtypes: Sequence[str],
    poisons: Sequence[str] = POISONS,
    modes: Sequence[str] = ("case",),
    stop_at_first: bool = False,
    ranks: Sequence[int] = (1,),
    tensor_ranks: Sequence[int] = (1,),
    without: Mapping[str, Any] | None = None,
) -> list[Assignment]:
    """Assignments for all backends.

    Args:
        names: backends.
        device: ``cpu``, ``cuda`` (all GPUs in turn) or ``cuda:N``.
        workers: processes at a time.
        seed: of the campaign; every shard derives its own.
        seconds: wall-clock time of the whole campaign.
        cases: per backend, all shards together.
        levels: ``layer``, ``kernel``.
        dtypes: to draw from; none for all.
        poisons: memory contents to run every case under.
        modes: ``case``, ``batch``, ``packed``; each backend has workers of its own for each, batches only where
            kernels are called.
        stop_at_first: end each assignment with its first finding.
        ranks: to draw layer cases for.
        tensor_ranks: that share the query heads of each of them.
        without: of a user's backend: capabilities as they were found out.
    """
    jobs = [(name, mode) for mode in modes for name in names if mode != "batch" or takes_batches(name, levels, device)]
    shards = max(1, workers // len(jobs))
    if cases is not None:
        shards = min(shards, max(1, cases // 50))
    # With more backends than workers, each gets its share of the time.
    share = None if seconds is None else seconds * min(1.0, workers / (len(jobs) * shards))
    places = devices_in_turn(device)
    # Teams of ranks that have a GPU each begin where others end.
    places = places[:: max(ranks) * max(tensor_ranks)]
    assignments: list[Assignment] = []
    for shard in range(shards):
        for index, (name, mode) in enumerate(jobs):
            part = None if cases is None else cases // shards + (shard < cases % shards)
            assignments.append(
                Assignment(
                    backend=name,
                    device=places[len(assignments) % len(places)],
                    seed=seed * 1009 + shard * len(jobs) + index,
                    levels=tuple(levels),
                    dtypes=tuple(dtypes),
                    cases=part,
                    seconds=share,
                    poisons=tuple(poisons),
                    mode=mode,
                    stop_at_first=stop_at_first,
                    ranks=tuple(ranks),
                    tensor_ranks=tuple(tensor_ranks),
                    without=dict(without or {}),
                )
            )
    return assignments


def share_of_time(planned: float, left: float, waiting: int, workers: int, starting: float | None) -> float:
    """Seconds for an assignment that is about to start, so that starting processes does not make a campaign longer.

    Args:
        planned: seconds that it was given when nobody knew what others would take.
        left: of the campaign's time.
        waiting: assignments that will have to follow.
        workers: at a time.
        starting: seconds that a process has been seen to take until its first case, which do not count as its share.
    """
    rounds = math.ceil((1 + waiting) / workers)
    if starting is None:
        # Of a single round nobody is told to hurry before it is known why.
        starting = STARTING if waiting else 0.0
    return max(left / rounds - starting, planned * LEAST_SHARE)
