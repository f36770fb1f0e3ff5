"""What is asked of a batch beside the budgets of its drawn values: adding a question is one function, listed here.

Known answers (oracle/known_answer) and relations (oracle/relations) make the tensors and compare the results, here as
in the checks of single cases (oracle/checks), to which a call that fails is handed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from attn_fuzz.batch.batch_run import APART, PROBED, TAILS, BatchRun
from attn_fuzz.batch.company import company
from attn_fuzz.batch.compiled import compiled_alike
from attn_fuzz.batch.launched import ordered_by_streams, replayed_alike
from attn_fuzz.batch.merging import merging
from attn_fuzz.batch.probes import PROBES
from attn_fuzz.batch.verdicts import largest_z, other_bits
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.calls import Asked, How
from attn_fuzz.execution.inferred import inferred
from attn_fuzz.generation.options import usual_scales
from attn_fuzz.oracle.checks.dead_rows import unfilled
from attn_fuzz.oracle.garbage import kernel_garbage
from attn_fuzz.oracle.relations import autograd
from attn_fuzz.oracle.relations.isolation import Spoiled, garbage_of, moved_bits
from attn_fuzz.oracle.relations.reordered import Reordered
from attn_fuzz.reference.answer import kernel_inputs


def probe_of(name: str) -> Callable[[BatchRun], None]:
    """Inputs made for it, in a run of their own from memory of the other kind."""

    def ask(batch_run: BatchRun) -> None:
        probe = PROBES[name](batch_run.case, batch_run.device, batch_run.profile)
        if probe is None:
            return
        tensors_of_calls = batch_run.load(batch_run.batch, probe.inputs)
        results = batch_run.run(tensors_of_calls, batch_run.other_poison, How(forward_only=not probe.backward))
        batch_run.symptoms = probe.symptoms
        batch_run.accused |= dict(zip(PROBED, probe.deviations(results).unbind(1), strict=True))

    return ask


def inference(batch_run: BatchRun) -> None:
    """The forward without autograd."""
    _asked(batch_run, autograd.INFERENCE)


def some_gradients(batch_run: BatchRun) -> None:
    """Gradients of some inputs only."""
    _, asked = autograd.some_gradients(batch_run.case)
    _asked(batch_run, asked)


def second_backward(batch_run: BatchRun) -> None:
    """A second backward over the same graph, for kernels that allow it."""
    _asked(batch_run, autograd.TWICE)


def _asked(batch_run: BatchRun, asked: Asked) -> None:
    # What is compiled would be compiled once more for each way to ask.
    if not batch_run.backend.kernel.compiled:
        batch_result = batch_run.run_batch(batch_run.tensors_of_calls, batch_run.other_poison, How(asked))
        if not batch_result.spent:
            batch_run.hold(batch_result.results)


def again(batch_run: BatchRun) -> None:
    """The drawn values once more, from memory of the other kind, the last call first, and backward in a thread of
    autograd's: the same bits where promised."""
    if names := batch_run.promised:
        second = batch_run.run(batch_run.tensors_of_calls, batch_run.other_poison, How(backwards=True, threaded=True))
        batch_run.accuse("bits", other_bits(batch_run.case, batch_run.first, second, names))


def documents_apart(batch_run: BatchRun) -> None:
    """Every other document full of garbage: the others' results are the same."""
    case, device = batch_run.case, batch_run.device
    garbage = garbage_of(case, inferred(batch_run.backend, str(device)), kernel_garbage(case))
    _judge(batch_run, Spoiled.documents(case, device, garbage))


def future_apart(batch_run: BatchRun) -> None:
    """Keys that earlier rows do not see, and later rows, full of garbage: those rows' results are the same."""
    spoiled = Spoiled.future(batch_run.case, batch_run.device, kernel_garbage(batch_run.case))
    if spoiled is not None:
        _judge(batch_run, spoiled)


def _judge(batch_run: BatchRun, spoiled: Spoiled) -> None:
    """Rows that had to stay keep their bits, in results that have the same bits every time."""
    names = [name for name in spoiled.results if name in batch_run.promised and len(batch_run.first.get(name, ()))]
    if not names:
        return
    after = batch_run.run(batch_run.load(batch_run.batch, spoiled.inputs(batch_run.inputs())), batch_run.poison)
    count = len(batch_run.case.packed_lengths)
    found = torch.zeros(count, dtype=torch.bool, device=batch_run.device)
    for name in names:
        if spoiled.fits(name, batch_run.first, after):
            pair = batch_run.first[name], after[name]
            found |= spoiled.compared(name, *pair, moved_bits(*pair)).of_documents(count)
    batch_run.accuse(APART, found)


def turned(batch_run: BatchRun) -> None:
    """Every call with its first document last, where the backend takes it so."""
    batch, order = batch_run.batch, list[int]()
    for index, (begin, end) in enumerate(batch.spans):
        span = [*range(begin + 1, end), begin]
        small = subset(batch.case, span)
        fits = small is not None and batch_run.backend.refusal(small, batch_run.device.type) is None
        order += span if fits else range(*batch.spans[index])
    reordered = Reordered.of(batch.case, order)
    assert reordered is not None
    other = CallBatch(reordered.after, batch.ends)
    tensors = batch_run.load(other, kernel_inputs(other.case, batch_run.device))
    batch_run.hold(reordered.back(batch_run.run(tensors, batch_run.other_poison, How(threaded=True))))


def other_scale(batch_run: BatchRun) -> None:
    """The same calls with another softmax scale, held to budgets of their own: what is kept by shape shows."""
    case, kind = batch_run.case, batch_run.device.type
    usual = usual_scales(batch_run.backend.kernel.capabilities_on(kind), case.head_dim)
    others = [each for scale in usual if (each := case.replace(scale=scale)).softmax_scale != case.softmax_scale]
    # The least: larger scores are harder on a budget of the first order.
    other = min(others, key=lambda each: each.softmax_scale, default=None)
    if other is not None and batch_run.backend.refusal(other, kind) is None:
        drawn = batch_run.inputs()
        results = batch_run.run(batch_run.load(CallBatch(other, batch_run.batch.ends), drawn), batch_run.other_poison)
        batch_run.deviations.append(largest_z(other, drawn, batch_run.profile, [results])[0])


_SPARES: Final = (1, 17)


def capacity(batch_run: BatchRun) -> None:
    """Rows behind the last document of each call, which no call may read, where the backend takes such."""
    if not inferred(batch_run.backend, str(batch_run.device)).capacity:
        return
    spare, kind = _SPARES[batch_run.case.seed % 2], batch_run.device.type
    calls = (batch_run.batch.call(index).replace(capacity=spare) for index in range(len(batch_run.batch.ends)))
    batch_run.spares = tuple(spare if batch_run.backend.refusal(call, kind) is None else 0 for call in calls)
    tensors_of_calls = batch_run.load(batch_run.batch, batch_run.inputs(), batch_run.spares)
    batch_result = batch_run.run_batch(tensors_of_calls, batch_run.other_poison)
    batch_run.hold(batch_result.results)
    if not batch_run.backend.kernel.capabilities_on(kind).covers_all_rows or not batch_result.tails:
        return
    by_call = [
        torch.stack([unfilled(name, tail).any() for name, tail in tails]) for tails in batch_result.tails.values()
    ]
    wrong = torch.stack([each.any() for each in by_call])
    last = torch.tensor([batch_run.batch.ends[index] - 1 for index in batch_result.tails]).to(batch_run.device)
    found = torch.zeros(len(batch_run.case.packed_lengths), dtype=torch.bool, device=batch_run.device)
    batch_run.accuse(TAILS, found.index_copy_(0, last, wrong))


QUESTIONS: Final[dict[str, Callable[[BatchRun], None]]] = {
    "": lambda batch_run: None,
    **{name: probe_of(name) for name in PROBES},
    "inference": inference,
    "some gradients": some_gradients,
    "second backward": second_backward,
    "again": again,
    "documents apart": documents_apart,
    "future apart": future_apart,
    "turned": turned,
    "other scale": other_scale,
    "capacity": capacity,
    "merging": merging,
    "company": company,
    "ordered by streams": ordered_by_streams,
    "replayed alike": replayed_alike,
    "compiled alike": compiled_alike,
}
