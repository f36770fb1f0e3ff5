"""A layer case on several ranks: each runs its slice, and here, in the parent, the whole is put together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import InsideLayer
from attn_fuzz.execution.observation import Observation
from attn_fuzz.ranks.rank_group import PATIENCE, QUICK_PATIENCE, RankGroup, RankGroups, rank_groups
from attn_fuzz.ranks.rank_run import Ran, load, run_slices
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs, layer_inputs
from attn_fuzz.reference.layout import Span, micro_sequences, rank_slice

OWNED = ("out", "dx", "dk", "dv")
"""Results of which each rank has the rows of its own tokens."""

REPLICATED = ("k", "v")
"""Results that every rank has whole, to the bit."""

BUFFERS = ("k", "v", "dk", "dv")


def run_ranks(
    backend: Backend,
    case: Case,
    inputs: LayerInputs,
    poisons: Sequence[str],
    device: torch.device,
    interfering: Case | None = None,
) -> list[Observation]:
    """A packed sequence through the backend's layer on ``case.all_ranks`` ranks, once under each poison.

    Where an interfering call is given, the first run is around its own.

    Raises:
        RankFailed: when a rank raised or died.
        RanksHung: when ranks did not come back.
        MisshapenResult: when a rank's layer returned something else than it should.
        UnsupportedCase: when the backend itself refuses.
    """
    by_rank = _ask(backend, [RankCall(case, inputs, interfering)], poisons, device)
    runs = [ran.observations for (ran,) in by_rank]
    return [assembled(case, poison, observed) for poison, *observed in zip(poisons, *runs, strict=True)]


class RankCall(NamedTuple):
    """One of several cases of one configuration that ranks are asked for together."""

    case: Case
    inputs: LayerInputs
    interfering: Case | None = None
    """Around whose own call it runs, if around one."""


def run_calls(backend: Backend, calls: Sequence[RankCall], poison: str, device: torch.device) -> list[Observation]:
    """Each of several packed sequences through the backend's layer, on as many ranks each, one after another.

    Raises:
        As ``run_ranks`` does, for any of them.
    """
    by_rank = _ask(backend, calls, (poison,), device)
    return [
        assembled(call.case, poison, [ran.observations[0] for ran in of_ranks])
        for call, *of_ranks in zip(calls, *by_rank, strict=True)
    ]


def _ask(backend: Backend, calls: Sequence[RankCall], poisons: Sequence[str], device: torch.device) -> list[list[Ran]]:
    """What came of each call on each rank of a group that has imported the backend."""
    # Drawn here once, and not on every rank.
    handed = [(*call, call.interfering and layer_inputs(call.interfering, "cpu")) for call in calls]
    arguments, ranks = (backend.name, tuple(poisons), handed), calls[0].case.all_ranks
    quick = device.type == "cpu" and not backend.kernel.compiled
    # A user's layer may compile something all the same.
    patience = QUICK_PATIENCE if quick and not isinstance(backend.kernel, InsideLayer) else PATIENCE
    groups = rank_groups()
    group = _ready(groups, backend.name, ranks, device)
    by_rank: list[list[Ran]] = groups.call(ranks, device, run_slices, arguments, patience, awake=quick)
    if len({of_rank[-1].messages for of_rank in by_rank}) > 1:
        group.uneven = backend.name
    return by_rank


def _ready(groups: RankGroups, backend: str, ranks: int, device: torch.device) -> RankGroup:
    """A group whose ranks have imported a backend, and in which no other one may have left a message behind."""
    group = groups.group(ranks, device)
    if group.uneven not in (None, backend):
        # It may have sent to single neighbours only, or not have met a collective of others.
        groups.replace(ranks, device)
        group = groups.group(ranks, device)
    if backend not in group.loaded:
        groups.call(ranks, device, load, (backend, tuple(sys.path)))
        group.loaded.add(backend)
    return group


def assembled(case: Case, poison: str, observed: Sequence[Observation]) -> Observation:
    """The observation of a whole case from those of its ranks, in their order.

    Owned rows are put in the order of tokens, what is replicated is the first rank's, and parameter gradients are added
    up, in float32 as data-parallel training does.
    """
    found = Observation(poison, {}, paths=frozenset().union(*(one.paths for one in observed)))
    names = [name for name in observed[0].results if all(name in one.results for one in observed)]
    for name in names:
        results = [one.results[name] for one in observed]
        if name in REPLICATED:
            found.results[name] = results[0]
        elif name in OWNED:
            found.results[name] = _by_tokens(case, results, own_rows_only=name in ("out", "dx"))
        else:
            found.results[name] = _parameter_gradient(case, name, results)
    for rank, one in enumerate(observed):
        found.changed += [f"{what} on rank {rank}" for what in one.changed]
        found.strays += [stray.on_rank(rank) for stray in one.strays]
    found.by_rank = tuple({name: one.results[name] for name in names if name in BUFFERS} for one in observed)
    return found


def _parameter_gradient(case: Case, name: str, results: Sequence[torch.Tensor]) -> torch.Tensor:
    """A parameter's gradient, added up over the ranks that have the same share of it, shares side by side."""
    dimension = {"d_query": 0, "d_dense": 1}.get(name)
    if dimension is None:
        return torch.stack(list(results)).sum(0)
    shares = [torch.stack(list(results[share :: case.tensor_ranks])).sum(0) for share in range(case.tensor_ranks)]
    return torch.cat(shares, dimension)


def _by_tokens(case: Case, results: Sequence[torch.Tensor], *, own_rows_only: bool) -> torch.Tensor:
    """Every rank's own rows, in the order of tokens.

    Args:
        case: the case.
        results: per rank, rows of its own slices one after another, or rows of all tokens.
        own_rows_only: which of the two.
    """
    rows, taken = [], 0
    for part in micro_sequences(case):
        size = part.length // case.all_ranks
        for rank, result in enumerate(results):
            own = Span(taken, taken + size) if own_rows_only else rank_slice(part, rank, case.all_ranks)
            rows.append(result[slice(*own)])
        taken += size
    return torch.cat(rows)
