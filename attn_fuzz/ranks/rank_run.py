"""What one rank does of a layer case: its slice of every micro-sequence."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.layer import Layer
from attn_fuzz.cases.interfering import crossing
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.poison import poisoned
from attn_fuzz.execution.runner import LayerRun, around, refusing_cleanly
from attn_fuzz.ranks.rank_process import here
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import Span, rank_slice


class RankRun(LayerRun):
    """One rank's share of a packed sequence: its slice of every micro-sequence, forward, then backward in reverse."""

    def own(self, part: Span) -> Span:
        collectives = here().collectives
        return rank_slice(part, collectives.rank, collectives.ranks)

    def slice_of_queries(self, part: Span) -> Span:
        return rank_slice(part, here().collectives.rank // self.case.tensor_ranks, self.case.ranks)

    def make_layer(self, weights: dict[str, torch.Tensor]) -> Layer:
        assert self.backend.rank_layer is not None
        return self.backend.rank_layer(weights, self.case, self.backend.kernel, here().collectives)


_loaded = functools.lru_cache(maxsize=None)(registry.load)


def load(backend: str, path: Sequence[str]) -> None:
    """Imports a backend, which may take far longer than a case does.

    Args:
        backend: its name.
        path: where the parent looks for modules, which it may have learnt after ranks were forked.
    """
    sys.path.extend(folder for folder in path if folder not in sys.path)
    _loaded(backend)


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one rank has done of a case."""

    observations: list[Observation]
    """One under each poison."""
    messages: int
    """How many its process group has begun so far, where torch tells it: as many on each rank that uses collectives."""


def run_slices(backend: str, poisons: Sequence[str], calls: Sequence[tuple[Any, ...]]) -> list[Ran]:
    """``run_slice`` of several calls, one after another: each a case, its inputs, an interfering call, its inputs."""
    return [run_slice(backend, case, inputs, poisons, *interfering) for case, inputs, *interfering in calls]


def run_slice(
    backend: str,
    case: Case,
    inputs: LayerInputs,
    poisons: Sequence[str],
    interfering: Case | None,
    interfering_calls: LayerInputs | None,
) -> Ran:
    """What one rank does: called in every rank of a group. One run per poison.

    Runs of a case are asked for together, because a call wakes every process up.
    """
    device, loaded = here().device, _loaded(backend)
    observations: list[Observation] = []
    for poison in poisons:
        run = RankRun(loaded, case, LayerTensors.of_one(case, inputs, device, poison))

        def made(other: Case, poison: str = poison) -> RankRun:
            assert interfering_calls is not None
            tensors = LayerTensors.of_one(other, interfering_calls, device, poison)
            return RankRun(loaded, other, tensors, watched=False)

        with poisoned(poison, device, free_blocks=loaded.kernel.compiled), refusing_cleanly([run]):
            for _ in around(None if observations else interfering, made, crossed=crossing(case), lockstep=True):
                run.forward()
            run.backward()
        observations.append(run.observe())
    # torch has no public name for it; gloo counts what is sent to one neighbour, too.
    counted = getattr(here().collectives.group, "_get_sequence_number_for_group", lambda: 0)()
    return Ran(observations, counted)
