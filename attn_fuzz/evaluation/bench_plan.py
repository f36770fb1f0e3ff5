"""What ``bench`` measures on a kind of device."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Final

from attn_fuzz.reference.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured on a kind of device."""

    documents: int
    layer_documents: int
    """At layer level: its many small operations cost as much for few documents as for many."""
    batch_documents: int
    """Of a batch's calls together."""
    longest: tuple[int, int]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"
    fewest: int
    """Documents of the first call that is tried."""
    case_hunt: int
    """Cases that one process hunts, counted rather than timed: a busy machine would get no further than its warm-up."""
    case_seconds: float
    """How long several processes hunt."""
    processes: tuple[int, ...]
    """How many processes share the device, by the case mode."""
    batch_processes: tuple[int, ...]
    """How many of them by batches, the usual number first: of the first backend all are tried."""
    layer_processes: tuple[int, ...]
    """The same of layer calls, whose host has more to do and whose device less."""
    batch_seconds: float
    """How long each of those hunts."""
    drawn_cases: int = 60
    """Cases drawn to time their generation and their bare kernels."""
    plain_cases: int
    rare: tuple[int, int]
    """The one size of a document that the planted fault gets wrong, of all up to ``rare_longest``."""
    rare_longest: tuple[int, int]
    rare_documents: int
    """Documents per call while looking for it."""


PLANS: Final = {
    "cuda": Plan(
        documents=4096,
        layer_documents=16384,
        batch_documents=1024,
        longest=(64, 128),
        heads=4,
        kv_heads=2,
        head_dim=64,
        fewest=64,
        case_hunt=100,
        case_seconds=15.0,
        processes=(16,),
        batch_processes=(12, 8),
        layer_processes=(15,),
        batch_seconds=10.0,
        plain_cases=200,
        rare=(201, 317),
        rare_longest=(256, 400),
        rare_documents=16384,
    ),
    "cpu": Plan(
        documents=512,
        layer_documents=512,
        batch_documents=256,
        longest=(16, 32),
        heads=2,
        kv_heads=1,
        head_dim=16,
        fewest=32,
        case_hunt=600,
        case_seconds=15.0,
        processes=(2,),
        batch_processes=(2,),
        layer_processes=(2,),
        batch_seconds=10.0,
        plain_cases=40,
        rare=(11, 23),
        rare_longest=(16, 32),
        rare_documents=256,
    ),
}


def layout(plan: Plan, documents: int, seed: int = 0) -> Case:
    """A causal call whose documents have 1 to the longest number of queries, and as many keys or more."""
    random = Random(seed)
    lengths = [random.randint(1, plan.longest[0]) for _ in range(documents)]
    return Case(
        level="kernel",
        lengths=tuple(lengths),
        key_lengths=tuple(random.randint(length, plan.longest[1]) for length in lengths),
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        dtype=plan.dtype,
        seed=seed,
    )
