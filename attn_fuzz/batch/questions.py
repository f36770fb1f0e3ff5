"""What is asked of a volley beside the budgets of its drawn values: adding a question is one function, listed here.

Each stands for a check or probe of the narrow gear (attn_fuzz/checks), to which a call that fails is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from attn_fuzz.batch.batch_run import APART, PROBED, TAILS, Firing
from attn_fuzz.batch.calls import How
from attn_fuzz.batch.packed import promised
from attn_fuzz.batch.probes import PROBES
from attn_fuzz.batch.row_index import Places
from attn_fuzz.batch.verdicts import largest_z, of_documents, other_bits
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.inferred import measured
from attn_fuzz.execution.runner import Asked
from attn_fuzz.generation.calls import Volley
from attn_fuzz.generation.strategies import usual_scales
from attn_fuzz.oracle.checks.asked import INFERENCE, SOME_GRADIENTS, TWICE
from attn_fuzz.oracle.checks.dead_rows import unfilled
from attn_fuzz.oracle.checks.isolation import first_kept, garbage_of, moved_bits
from attn_fuzz.oracle.garbage import kernel_garbage
from attn_fuzz.reference.answer import KERNEL_TENSORS, Inputs, kernel_inputs


def probe_of(name: str) -> Callable[[Firing], None]:
    """Inputs made for it, in a run of their own from memory of the other kind."""

    def ask(firing: Firing) -> None:
        probe = PROBES[name](firing.case, firing.device, firing.profile)
        if probe is None:
            return
        loaded = firing.load(firing.volley, probe.inputs)
        results = firing.run(loaded, firing.other_poison, How(forward_only=not probe.backward))
        firing.symptoms = probe.symptoms
        firing.accused |= dict(zip(PROBED, probe.deviations(results).unbind(1), strict=True))

    return ask


def inference(firing: Firing) -> None:
    """The forward without autograd."""
    _asked(firing, INFERENCE)


def some_gradients(firing: Firing) -> None:
    """Gradients of some inputs only."""
    some = list(SOME_GRADIENTS.values())
    _asked(firing, some[firing.case.seed % len(some)])


def second_backward(firing: Firing) -> None:
    """A second backward over the same graph, for kernels that allow it."""
    _asked(firing, TWICE)


def _asked(firing: Firing, asked: Asked) -> None:
    # What is compiled would be compiled once more for each way to ask.
    if not firing.backend.kernel.compiled:
        fired = firing.fire(firing.loaded, firing.other_poison, How(asked))
        if not fired.spent:
            firing.hold(fired.results)


def again(firing: Firing) -> None:
    """The drawn values once more, from memory of the other kind, the last call first: the same bits where promised."""
    if names := promised(firing.backend, firing.device):
        second = firing.run(firing.loaded, firing.other_poison, How(backwards=True))
        firing.accuse("bits", other_bits(firing.case, firing.first, second, names))


def documents_apart(firing: Firing) -> None:
    """Every other document full of garbage: the others' results are the same."""
    garbage = garbage_of(firing.case, measured(firing.backend, str(firing.device)), kernel_garbage(firing.case))
    places, turn = Places(firing.case, firing.device), first_kept(firing.case)
    _spoiled(firing, places.owner % 2 == turn, places.key_owner % 2 == turn, garbage, KERNEL_TENSORS)


def future_apart(firing: Firing) -> None:
    """Keys that earlier rows do not see, and later rows, full of garbage: those rows' results are the same."""
    if max(firing.case.effective_window) < 0:
        return
    places = Places(firing.case, firing.device)
    rest = places.lengths // 2
    every = torch.arange(len(rest), device=firing.device)
    # What rows in a row see is a run of keys, too.
    begin, end = places.seen_by(torch.zeros_like(rest), every)[0], places.seen_by(rest - 1, every)[1]
    end, owner = torch.where(rest > 0, end, begin), places.key_owner
    seen = (places.key_position >= begin[owner]) & (places.key_position < end[owner])
    # Finite: kernels multiply whole tiles, so that masked NaN in a row's own tile may stay NaN.
    _spoiled(firing, places.position < rest[places.owner], seen, kernel_garbage(firing.case), ("out", "lse", "dq"))


def _spoiled(
    firing: Firing,
    rows: torch.Tensor,
    key_rows: torch.Tensor,
    garbage: float,
    results: Sequence[str],
) -> None:
    """Garbage everywhere but in some rows, some of whose results keep their bits where that is promised."""
    promises = promised(firing.backend, firing.device)
    names = [name for name in results if name in promises and len(firing.first.get(name, ()))]
    if not names:
        return
    kept = {"q": rows, "k": key_rows, "v": key_rows, "dout": rows}
    drawn = firing.inputs()
    tensors = {name: getattr(drawn, name) for name in kept}
    spoilt = {name: torch.where(kept[name][:, None, None], x, x.new_tensor(garbage)) for name, x in tensors.items()}
    after = firing.run(firing.load(firing.volley, Inputs(**spoilt)), firing.poison)
    found = torch.zeros(len(firing.case.packed_lengths), dtype=torch.bool, device=firing.device)
    for name in names:
        if name in after:
            differs = moved_bits(firing.first[name], after[name]).flatten(1).any(1)
            mine = key_rows if name in ("dk", "dv") else rows
            found |= of_documents(firing.case, name, differs & mine)
    firing.accuse(APART, found)


def turned(firing: Firing) -> None:
    """Every call with its first document last, where the backend takes it so."""
    volley, order = firing.volley, list[int]()
    for index, (begin, end) in enumerate(volley.spans):
        span = [*range(begin + 1, end), begin]
        small = subset(volley.case, span)
        fits = small is not None and firing.backend.refusal(small, firing.device.type) is None
        order += span if fits else range(*volley.spans[index])
    case = subset(volley.case, order)
    assert case is not None
    other = Volley(case, volley.ends)
    results = firing.run(firing.load(other, kernel_inputs(case, firing.device)), firing.other_poison)
    before, after = Places(volley.case, firing.device), Places(case, firing.device)
    places = torch.tensor(order).to(firing.device)
    rows = before.begins[places][after.owner] + after.position
    key_rows = before.key_begins[places][after.key_owner] + after.key_position
    firing.hold(
        {
            name: torch.empty_like(x).index_copy_(0, key_rows if name in ("dk", "dv") else rows, x)
            for name, x in results.items()
        }
    )


def other_scale(firing: Firing) -> None:
    """The same calls with another softmax scale, held to budgets of their own: what is kept by shape shows."""
    case, kind = firing.case, firing.device.type
    usual = usual_scales(firing.backend.kernel.capabilities_on(kind), case.head_dim)
    others = [each for scale in usual if (each := case.replace(scale=scale)).softmax_scale != case.softmax_scale]
    # The least: larger scores are harder on a budget of the first order.
    other = min(others, key=lambda each: each.softmax_scale, default=None)
    if other is not None and firing.backend.refusal(other, kind) is None:
        drawn = firing.inputs()
        results = firing.run(firing.load(Volley(other, firing.volley.ends), drawn), firing.other_poison)
        firing.deviations.append(largest_z(other, drawn, firing.profile, [results])[0])


_SPARES: Final = (1, 17)


def capacity(firing: Firing) -> None:
    """Rows behind the last document of each call, which nobody may read, where the backend takes such."""
    if not measured(firing.backend, str(firing.device)).capacity:
        return
    spare, kind = _SPARES[firing.case.seed % 2], firing.device.type
    calls = (firing.volley.call(index).replace(capacity=spare) for index in range(len(firing.volley.ends)))
    firing.spares = tuple(spare if firing.backend.refusal(call, kind) is None else 0 for call in calls)
    loaded = firing.load(firing.volley, firing.inputs(), firing.spares)
    fired = firing.fire(loaded, firing.other_poison)
    firing.hold(fired.results)
    if not firing.backend.kernel.capabilities_on(kind).covers_all_rows or not fired.tails:
        return
    by_call = [torch.stack([unfilled(name, tail).any() for name, tail in tails]) for tails in fired.tails.values()]
    wrong = torch.stack([each.any() for each in by_call])
    last = torch.tensor([firing.volley.ends[index] - 1 for index in fired.tails]).to(firing.device)
    found = torch.zeros(len(firing.case.packed_lengths), dtype=torch.bool, device=firing.device)
    firing.accuse(TAILS, found.index_copy_(0, last, wrong))


QUESTIONS: Final[dict[str, Callable[[Firing], None]]] = {
    "": lambda firing: None,
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
