"""What is asked of a batch beside the budgets of its drawn values: adding a question is one function, listed here.

Each stands for a check or probe of the case mode (attn_fuzz/oracle/checks), to which a call that fails is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from attn_fuzz.batch.batch_run import APART, PROBED, TAILS, BatchRun
from attn_fuzz.batch.calls import How
from attn_fuzz.batch.probes import PROBES
from attn_fuzz.batch.verdicts import largest_z, of_documents, other_bits
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.inferred import inferred
from attn_fuzz.execution.runner import Asked
from attn_fuzz.generation.calls import CallBatch
from attn_fuzz.generation.options import usual_scales
from attn_fuzz.oracle.checks.asked import INFERENCE, SOME_GRADIENTS, TWICE
from attn_fuzz.oracle.checks.dead_rows import unfilled
from attn_fuzz.oracle.checks.isolation import first_kept, garbage_of, moved_bits
from attn_fuzz.oracle.garbage import kernel_garbage
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.reference.answer import KERNEL_TENSORS, Inputs, kernel_inputs


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
    _asked(batch_run, INFERENCE)


def some_gradients(batch_run: BatchRun) -> None:
    """Gradients of some inputs only."""
    some = list(SOME_GRADIENTS.values())
    _asked(batch_run, some[batch_run.case.seed % len(some)])


def second_backward(batch_run: BatchRun) -> None:
    """A second backward over the same graph, for kernels that allow it."""
    _asked(batch_run, TWICE)


def _asked(batch_run: BatchRun, asked: Asked) -> None:
    # What is compiled would be compiled once more for each way to ask.
    if not batch_run.backend.kernel.compiled:
        batch_result = batch_run.run_batch(batch_run.tensors_of_calls, batch_run.other_poison, How(asked))
        if not batch_result.spent:
            batch_run.hold(batch_result.results)


def again(batch_run: BatchRun) -> None:
    """The drawn values once more, from memory of the other kind, the last call first: the same bits where promised."""
    if names := batch_run.promised:
        second = batch_run.run(batch_run.tensors_of_calls, batch_run.other_poison, How(backwards=True))
        batch_run.accuse("bits", other_bits(batch_run.case, batch_run.first, second, names))


def documents_apart(batch_run: BatchRun) -> None:
    """Every other document full of garbage: the others' results are the same."""
    garbage = garbage_of(
        batch_run.case, inferred(batch_run.backend, str(batch_run.device)), kernel_garbage(batch_run.case)
    )
    places, turn = RowIndex(batch_run.case, batch_run.device), first_kept(batch_run.case)
    _spoiled(batch_run, places.owner % 2 == turn, places.key_owner % 2 == turn, garbage, KERNEL_TENSORS)


def future_apart(batch_run: BatchRun) -> None:
    """Keys that earlier rows do not see, and later rows, full of garbage: those rows' results are the same."""
    if max(batch_run.case.effective_window) < 0:
        return
    places = RowIndex(batch_run.case, batch_run.device)
    rest = places.lengths // 2
    every = torch.arange(len(rest), device=batch_run.device)
    # What rows in a row see is a run of keys, too.
    begin, end = places.seen_by(torch.zeros_like(rest), every)[0], places.seen_by(rest - 1, every)[1]
    end, owner = torch.where(rest > 0, end, begin), places.key_owner
    seen = (places.key_position >= begin[owner]) & (places.key_position < end[owner])
    # Finite: kernels multiply whole tiles, so that masked NaN in a row's own tile may stay NaN.
    _spoiled(
        batch_run, places.position < rest[places.owner], seen, kernel_garbage(batch_run.case), ("out", "lse", "dq")
    )


def _spoiled(
    batch_run: BatchRun,
    rows: torch.Tensor,
    key_rows: torch.Tensor,
    garbage: float,
    results: Sequence[str],
) -> None:
    """Garbage everywhere but in some rows, some of whose results keep their bits where that is promised."""
    names = [name for name in results if name in batch_run.promised and len(batch_run.first.get(name, ()))]
    if not names:
        return
    kept = {"q": rows, "k": key_rows, "v": key_rows, "dout": rows}
    drawn = batch_run.inputs()
    tensors = {name: getattr(drawn, name) for name in kept}
    spoilt = {name: torch.where(kept[name][:, None, None], x, x.new_tensor(garbage)) for name, x in tensors.items()}
    after = batch_run.run(batch_run.load(batch_run.batch, Inputs(**spoilt)), batch_run.poison)
    found = torch.zeros(len(batch_run.case.packed_lengths), dtype=torch.bool, device=batch_run.device)
    for name in names:
        if name in after:
            differs = moved_bits(batch_run.first[name], after[name]).flatten(1).any(1)
            mine = key_rows if name in ("dk", "dv") else rows
            found |= of_documents(batch_run.case, name, differs & mine)
    batch_run.accuse(APART, found)


def turned(batch_run: BatchRun) -> None:
    """Every call with its first document last, where the backend takes it so."""
    batch, order = batch_run.batch, list[int]()
    for index, (begin, end) in enumerate(batch.spans):
        span = [*range(begin + 1, end), begin]
        small = subset(batch.case, span)
        fits = small is not None and batch_run.backend.refusal(small, batch_run.device.type) is None
        order += span if fits else range(*batch.spans[index])
    case = subset(batch.case, order)
    assert case is not None
    other = CallBatch(case, batch.ends)
    results = batch_run.run(batch_run.load(other, kernel_inputs(case, batch_run.device)), batch_run.other_poison)
    before, after = RowIndex(batch.case, batch_run.device), RowIndex(case, batch_run.device)
    places = torch.tensor(order).to(batch_run.device)
    rows = before.begins[places][after.owner] + after.position
    key_rows = before.key_begins[places][after.key_owner] + after.key_position
    batch_run.hold(
        {
            name: torch.empty_like(x).index_copy_(0, key_rows if name in ("dk", "dv") else rows, x)
            for name, x in results.items()
        }
    )


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
}
