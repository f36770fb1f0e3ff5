"""A batch of layer calls from end to end: run them, judge every document of each, and wait for the device once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.layer_columns import LAYER_NAMES
from attn_fuzz.batch.layer_questions import LAYER_QUESTIONS, how
from attn_fuzz.batch.layer_run import SAMPLES, LayerBatchRun
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.inferred import TIMES, promises
from attn_fuzz.execution.layer_calls import LayerHow

LAYER_SCHEDULE: Final = (
    Question("nan", "steps"),
    Question("finite", "cut elsewhere"),
    Question("nan"),
    Question("nan", "documents apart"),
    Question("finite", "steps"),
    Question("nan", "whole numbers"),
    Question("finite"),
    Question("finite", "again"),
    Question("nan", "interfered"),
    Question("finite", "halves"),
    Question("nan", "cut elsewhere"),
)
"""Of every campaign, in turn: a question is one run more of every call, or two. Their number has no divisor in common
with that of sizes (generation/layer_calls.py)."""


def judge_layer_calls(
    batch: CallBatch,
    backend: Backend,
    device: torch.device,
    question: Question = LAYER_SCHEDULE[0],
    beat: Callable[[], None] = lambda: None,
    samples: int = SAMPLES,
    asked: int | None = None,
) -> Judged:
    """Runs every layer call with drawn values, and as the question has it, from poisoned memory; judges all of it.

    Args:
        batch: the calls.
        backend: whose layer.
        device: where.
        question: what is asked.
        beat: called before every call of every run.
        samples: simulated roundings behind the budgets.
        asked: of how many calls, from the first on; None for all.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    asked = asked or len(batch.ends)
    run = LayerBatchRun(batch, backend, device, question.poison, asked, beat, samples)
    run.begin(how(question.asked, device, asked))
    if run.all_first:
        # Of calls none of which came back there is nothing to ask.
        run.hold(run.all_first)
        LAYER_QUESTIONS[question.asked](run)
    touched = torch.stack([each.changed() for each in run.placed]).any()
    # The one transfer, but for runs that are watched step by step.
    flat = torch.cat([run.z.flatten(), touched[None].double()]).cpu()
    broken: dict[int, str] = {}
    refused: dict[int, str] = {}
    for found in run.runs:
        broken = found.broken | broken
        refused |= found.refused
    return Judged(
        batch,
        flat[:-1].view(run.z.shape),
        question,
        broken,
        refused,
        touched=bool(flat[-1]),
        paths=frozenset().union(*(found.paths for found in run.runs)),
        asked=asked,
        names=LAYER_NAMES,
        incomplete=frozenset().union(*(found.incomplete for found in run.runs)),
    )


def moving_layers(batch: CallBatch, backend: Backend, device: torch.device, poison: str) -> torch.Tensor:
    """Documents whose results have other bits from one run to the next, of results that are promised by no statement.

    Args:
        batch: layer calls.
        backend: whose layer.
        device: where.
        poison: contents of unwritten memory, the same in each run.

    Returns:
        bool ``[documents]`` on the CPU.
    """
    run = LayerBatchRun(batch, backend, device, poison, len(batch.ends))
    run.begin(LayerHow(watched=False))
    names = [name for name in run.first if run.repeats(name) and not promises(backend, str(device), name)]
    for _ in range(TIMES - 1 if names else 0):
        run.note_moved(names, run.run(run.tensors, poison))
    return (run.z[:, LAYER_NAMES.index("bits")] > 0).cpu()
