"""A packed case of thousands of documents: a batch of one call, or a layer's, and which of its documents are wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.batch_run import PROBED
from attn_fuzz.batch.judge import judge, moving
from attn_fuzz.batch.judged import BY_BITS, Judged, Question, tensor_of
from attn_fuzz.batch.layer import judge_layer
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.oracle.symptoms import InputsChanged, PoisonLeaked, Symptom, WrongSpread
from attn_fuzz.oracle.trial import SECOND_SEED
from attn_fuzz.reference.case import Case

BUDGETS: Final = Question("nan")
"""Nothing is asked but the budgets."""

PACKED_SCHEDULE: Final = (
    Question("nan", "keys"),
    Question("nan", "again"),
    Question("nan", "needle"),
    Question("nan", "every row"),
    Question("nan", "swamping"),
)
"""What is asked of packed calls, in turn, beside their budgets; sizes take turns too, by three."""


@dataclasses.dataclass(frozen=True)
class PackedFailure:
    """A packed case that one backend fails, under two value seeds."""

    case: Case
    documents: tuple[int, ...]
    """Places in the case, worst first."""
    symptom: type[Symptom]
    message: str
    tensor: str
    """The result that is wrong; empty where it is none, or any."""


def judge_packed(
    case: Case,
    backend: Backend,
    device: torch.device,
    question: Question = BUDGETS,
    beat: Callable[[], None] = lambda: None,
) -> Judged:
    """Runs a packed case and judges every document.

    Args:
        case: of kernel or layer level.
        backend: what runs it.
        device: where.
        question: what is asked of a kernel.
        beat: called before every run of a kernel.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    if case.level == "layer":
        return judge_layer(case, backend, device)
    judged = judge(CallBatch.of_one(case), backend, device, question, beat)
    columns = [judged.names.index(name) for name in BY_BITS]
    if judged.z[:, columns].any():
        # Not bits that change from one run to the next whatever memory holds, where nothing is promised.
        judged.z[:, columns] = judged.z[:, columns].masked_fill(
            moving(judged.batch, backend, device, question.poison)[:, None], 0.0
        )
    return judged


def packed_failure(
    case: Case, backend: Backend, device: torch.device, question: Question = BUDGETS
) -> PackedFailure | None:
    """The verdict on a packed case and a backend: None for a clean one, and for one that the backend refuses."""

    def judged(each: Case) -> Judged:
        return judge_packed(each, backend, device, question)

    return confirmed(judged(case), judged)


def confirmed(judged: Judged, again: Callable[[Case], Judged]) -> PackedFailure | None:
    """Whether a packed case that one value seed fails is failed under a second one too, and by which documents.

    Args:
        judged: what came of it.
        again: runs another case on the same backend, in the same way.
    """
    case, failing = judged.batch.case, judged.wrong()
    # What a probe says exactly needs no second value seed, and what fails as a whole has no values.
    certain = judged.z.isinf() & torch.tensor([name in PROBED for name in judged.names])
    if _whole(judged) is None and (failing & ~certain).any():
        failing &= certain | again(case.replace(seed=case.seed ^ SECOND_SEED)).wrong()
    worst = torch.where(failing, judged.z, -1.0).amax(1)
    order = worst.argsort(descending=True, stable=True)
    documents = tuple(order[: int(failing.any(1).sum())].tolist())
    if not documents:
        return None
    return PackedFailure(case, documents, *_named(judged, failing, documents))


def _whole(judged: Judged) -> str | None:
    """What is wrong with the case as a whole, in words: it raised, results are missing, inputs changed."""
    if judged.broken:
        return next(iter(judged.broken.values()))
    return "an input or its guard margin changed" if judged.touched else None


def _named(judged: Judged, failing: torch.Tensor, documents: Sequence[int]) -> tuple[type[Symptom], str, str]:
    """The symptom of a failing case, one sentence on it, and the result that it is about."""
    case, count = judged.batch.case, len(judged.batch.case.packed_lengths)
    if (whole := _whole(judged)) is not None:
        symptom = judged.fallen(next(iter(judged.broken))) if judged.broken else InputsChanged
        return symptom, f"a call of {count} documents: {whole}", ""
    first = documents[0]
    # What a probe says is exact, and an element outside its budget says more than its row does.
    column = min(
        failing[first].nonzero()[:, 0].tolist(),
        key=lambda each: (
            judged.names[each] not in PROBED,
            judged.names[each].endswith("-rows"),
            -judged.z[first, each].item(),
        ),
    )
    name, z = judged.names[column], judged.z[first, column].item()
    place = f"document {first} ({case.packed_lengths[first]} queries, {case.packed_key_lengths[first]} keys)"
    rest = f"{len(documents)} of {count} documents wrong"
    symptom, tensor = judged.symptom(name), tensor_of(name)
    if name in PROBED:
        said = f"{tensor} of {place} is not what the probe {judged.question.asked!r} makes of it; {rest}"
    elif symptom is PoisonLeaked:
        said = f"results of {place} change with the contents of memory that nothing has written; {rest}"
    elif symptom is WrongSpread:
        said = f"{tensor} of {place}: a row as a whole is off ({z:.3g}); {rest}"
    else:
        said = f"{name} of {place}: z = {z:.3g}; {rest}"
    return symptom, said, tensor
