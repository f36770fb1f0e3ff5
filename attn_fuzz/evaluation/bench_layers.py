"""Batches of layer calls beside the bare layers on the same calls.

What is measured is what campaigns do: a batch is drawn, answered, run and judged, sizes and questions in turn. The bare
layers run forward and backward on the same calls and tensors, and nothing is looked at.
"""

from __future__ import annotations

from random import Random
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judge import judge, usually_asked
from attn_fuzz.batch.layer_judge import LAYER_SCHEDULE
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.autograd_threads import autograd_threads
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.execution.runner import LayerRun
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layer_calls import LONGEST, draw_layer_batch
from attn_fuzz.reference.layer import layer_inputs

CALLS: Final = {"cpu": 48, "cuda": 128}
"""Of a batch, as many as campaigns come to, whose batches take one to two seconds on a GPU and less on a CPU."""

_BATCHES: Final = 11
"""Different ones; sizes and questions have no divisor in common with their number, or are as many."""


class LayerBench:
    """Some batches of layer calls, to be judged or run bare.

    Args:
        backend: whose layer.
        device: where.
        seed: of what is drawn.
    """

    def __init__(self, backend: Backend, device: torch.device, seed: int) -> None:
        self.backend, self.device, self.seed = backend, device, seed
        self.domain = Domain.of(backend.kernel.capabilities_on(device.type), device.type)
        batches = [self._drawn(number) for number in range(_BATCHES)]
        self.placed = [LayerTensors(batch, layer_inputs(batch.case, device), device, "zero") for batch in batches]

    def _drawn(self, number: int) -> CallBatch:
        random = Random(self.seed * 1009 + number)
        kind = self.device.type
        longest = LONGEST[kind]
        batch = draw_layer_batch(random, self.backend, self.domain, CALLS[kind], longest[number % len(longest)])
        assert batch is not None, f"{self.backend.name} takes no layer call"
        return batch

    def judged(self, turn: int) -> int:
        """Draws and judges a batch; gives how many calls it has."""
        batch = self._drawn(turn % _BATCHES)
        # Each batch meets another question every round.
        question = LAYER_SCHEDULE[(turn + turn // _BATCHES) % len(LAYER_SCHEDULE)]
        judge(batch, self.backend, self.device, question, asked=usually_asked(batch))
        return len(batch.ends)

    def bare(self, turn: int) -> int:
        """Forward and backward of the same batch's calls; gives how many it has."""
        placed = self.placed[turn % _BATCHES]
        with autograd_threads(own=False):
            for index, case in enumerate(placed.batch.calls):
                run = LayerRun(self.backend, case, placed, index, watched=False)
                run.forward()
                run.backward()
        return len(placed.batch.ends)
