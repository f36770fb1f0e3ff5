"""What is asked of a batch of layer calls beside the budgets of its drawn values: a question is one function here.

Known answers (oracle/known_answer) and relations (oracle/relations) are those of the checks of single cases
(oracle/checks), to which a call that fails is handed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import torch

from attn_fuzz.batch.batch_run import APART
from attn_fuzz.batch.layer_columns import HALVES, WHOLE
from attn_fuzz.batch.layer_run import LayerBatchRun
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.inferred import inferred
from attn_fuzz.execution.layer_calls import LayerHow
from attn_fuzz.oracle.checks.regroup import recut
from attn_fuzz.oracle.garbage import layer_garbage
from attn_fuzz.oracle.known_answer.accumulation import accumulation_probe
from attn_fuzz.oracle.known_answer.slack import holds_whole_numbers
from attn_fuzz.oracle.relations.halves import apart, summed_in_float32, with_gradient_of
from attn_fuzz.oracle.relations.isolation import Spoiled, far_apart, garbage_of


def again(run: LayerBatchRun) -> None:
    """The drawn values once more, from memory of the other kind, the last call first, and backward in a thread of
    autograd's: the same bits where promised."""
    second = run.run(run.tensors, run.other_poison, LayerHow(watched=False, backwards=True, threaded=True))
    run.note_moved(filter(run.repeats, second), second)
    run.hold(second)


def documents_apart(run: LayerBatchRun) -> None:
    """Every other document full of garbage: the others' results stay within the roundings of two runs."""
    garbage = garbage_of(run.case, inferred(run.backend, str(run.device)), layer_garbage(run.case, run.drawn))
    spoiled = Spoiled.documents(run.case, run.device, garbage)
    after = run.run(run.load(run.batch, spoiled.layer_inputs(run.drawn)), run.poison)
    for name in spoiled.results:
        expected = run.expected(name, run.count(name))
        if expected is not None and spoiled.fits(name, run.first, after):
            before, now = run.first[name], after[name]
            moved = far_apart(before, now, expected.variance)
            run.note(APART, name, spoiled.compared(name, before, now, moved).wrong)


def cut_elsewhere(run: LayerBatchRun) -> None:
    """Every call without its cuts, or cut in the middle, where the layer takes it so; or on one rank where it was on
    several: within the same budgets."""
    if run.case.all_ranks > 1:
        alone = CallBatch(run.case.replace(ranks=1, tensor_ranks=1), run.batch.ends)
        if _taken(run, alone):
            run.hold(run.run(run.load(alone, run.drawn), run.other_poison))
        return
    cuts, begin = set[int](), 0
    for call in run.batch.calls:
        other = recut(call)
        taken = other if other is not None and run.backend.refusal(other, run.device.type) is None else call
        cuts |= {begin + cut for cut in taken.cuts} | ({begin} if begin else set())
        begin += call.tokens
    batch = CallBatch(run.case.replace(cuts=tuple(sorted(cuts))), run.batch.ends)
    run.hold(run.run(run.load(batch, run.drawn), run.other_poison))


def whole_numbers(run: LayerBatchRun) -> None:
    """Gradients that are sums of whole numbers over micro-sequences: exact, where the layer keeps them in float32."""
    if not holds_whole_numbers(run.case, run.backend.kernel.profile_on(run.device.type)):
        return
    probe = accumulation_probe(run.case, run.batch.calls)
    batch = None if probe is None else CallBatch(probe.case, run.batch.ends)
    if probe is None or batch is None or not _taken(run, batch):
        return
    results = run.run(run.load(batch, probe.inputs), run.poison)
    for name, exact in probe.exact.items():
        got = results.get(name)
        if got is not None and got.dtype == torch.float32 and got.shape == exact.shape:
            owed = exact.to(run.device)
            run.note(WHOLE, name, (got.double() != owed) & ~owed.isnan())


def _taken(run: LayerBatchRun, batch: CallBatch) -> bool:
    """Whether the backend takes every call of a batch that differs in its configuration only."""
    return all(run.backend.refusal(call, run.device.type) is None for call in batch.calls)


def halves(run: LayerBatchRun) -> None:
    """Sums in float32 over two halves of the micro-sequences add up to those over all."""
    names = [name for name in summed_in_float32(run.case, run.first) if run.repeats(name)]
    if not names:
        return
    parts = [run.run(run.load(run.batch, with_gradient_of(run.case, run.drawn, half)), run.poison) for half in (0, 1)]
    for name in names:
        if all(name in part and part[name].shape == run.first[name].shape for part in parts):
            three = [run.first[name], *(part[name] for part in parts)]
            largest = torch.stack([run.by_call(name, x) for x in three]).amax(0)
            run.note(HALVES, name, apart(three[0], three[1], three[2], largest))


LAYER_QUESTIONS: Final[dict[str, Callable[[LayerBatchRun], None]]] = {
    "": lambda run: None,
    "steps": lambda run: None,
    "interfered": lambda run: None,
    "again": again,
    "documents apart": documents_apart,
    "cut elsewhere": cut_elsewhere,
    "whole numbers": whole_numbers,
    "halves": halves,
}
"""Two of them are said by the first run of the drawn values (``how``): ``interfered``, each call around another one of
the same shapes, so that what a layer keeps by shape is the other's; and ``steps``, a GPU's memory filled at every
allocation, backward in a thread of autograd's, and buffers and what was handed back compared step by step, which they
always are on CPUs, for it costs nothing there."""


def how(question: str, device: torch.device, asked: int) -> LayerHow:
    """In which way the drawn values run first, where so many of the calls are asked."""
    usual = LayerHow(watched=device.type == "cpu")
    if question == "interfered":
        return dataclasses.replace(usual, interfered=True, others=(asked, usual))
    if question == "steps":
        return LayerHow(watched=True, filled=True, threaded=True, others=(asked, usual))
    return usual
