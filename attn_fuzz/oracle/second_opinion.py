"""A second opinion before a backend is accused: the answer once more, one document at a time.

Verdicts on kernel cases rest on the vectorised reference (``reference/batched.py``, ``reference/vectorised.py``), which
takes many documents at once, padded to one size. What would be accused by its numbers is held against the pure one
(``reference/answer.py``), which has masks, softmax, gradients and budgets of its own. Inputs are the same for both, and
so is the table of a profile's sums. Where the two differ the mistake is the harness's, and no backend is accused.

Covered: what kernel cases are accused of by the checks in ``ANSWERED`` and by the every-row probe, and what calls that
were judged together are accused of by their budgets. Not covered: the other exact probes, which know their answers, and
what is seen on bits or memory. Nor layers: a layer case is judged by ``reference/layer.py``, which keeps documents
apart already and shares no attention with the vectorised reference; it has no second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch

from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.known_answer.every_row import EveryRow
from attn_fuzz.oracle.relations.merged import Parts
from attn_fuzz.oracle.symptoms import WRONG_TENSOR, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference import answer, batched
from attn_fuzz.reference.answer import Expected, Inputs, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import UNIT_ROUNDOFF, Profile

ANSWERED: Final = ("budget", "spread", "asked", "dead_rows", "regrouping", "merging", "company")
"""Checks that hold results against the answer to the case; regrouping begins with that one, in another order."""

AGREEMENT: Final = 1e-9
"""By what share of its size a value may differ between the references, which add up in orders of their own: 5e-14 was
the most on 396 drawn calls of four profiles. It moves no z by more than 0.02, and in half precision by far less."""

_BORDER: Final = 1e-6
"""Share of the limit by which an accused element may lie within it: the references' budgets differ by less."""


_ONE_BY_ONE: Final = 1 << 14
"""Documents that the pure reference takes one after another; of more, which take minutes, those of a size together."""


class ReferencesDisagree(Exception):
    """The harness's two references give different answers, so no backend can be accused; one sentence."""


def confirm(trial: Trial, symptoms: Sequence[Symptom]) -> None:
    """Asks for the second opinion on what a case is about to be accused of.

    Args:
        trial: the case, with what came out.
        symptoms: what was seen.

    Raises:
        ReferencesDisagree: when it is another one.
    """
    case, profile, checks = trial.case, trial.profile, {symptom.check for symptom in symptoms}
    if case.level != "kernel":
        return
    if not checks.isdisjoint(ANSWERED):
        assert isinstance(trial.inputs, Inputs)
        pure = one_by_one(case, trial.inputs, profile)
        _require_agreement(case, trial.answer, pure)
        for name in dict.fromkeys(symptom.tensor for symptom in symptoms if symptom.check == "budget"):
            _require_excess(case, name, _results(trial, name, pure[name]), (trial.answer[name], pure[name]))
    if "merging" in checks and (parts := Parts.of(case, blind=trial.stated.queries_without_keys)) is not None:
        assert isinstance(trial.inputs, Inputs)
        for part, inputs in zip(parts.cases, parts.inputs(trial.inputs), strict=True):
            _compare(part, inputs, profile)
    if "every_row" in checks:
        _compare(case, EveryRow.of(case, torch.device("cpu"), profile).inputs, profile)


def confirm_call(case: Case, symptom: type[Symptom], profile: Profile, device: torch.device) -> None:
    """The same for a case that was judged among others, where only their values are there to be compared.

    Args:
        case: what is about to be accused.
        symptom: of what.
        profile: how the backend computes.
        device: where it was judged.

    Raises:
        ReferencesDisagree: when the references do not agree there.
    """
    if case.level == "kernel" and symptom in WRONG_TENSOR.values():
        _compare(case, kernel_inputs(case, device), profile)


def confirm_results(
    case: Case,
    inputs: Inputs,
    results: Mapping[str, torch.Tensor],
    quick: Mapping[str, Expected],
    profile: Profile,
) -> None:
    """The same for results of a call of somebody's own, wherever they are.

    Args:
        case: what the call was.
        inputs: what it was given.
        results: what is about to be accused, by name.
        quick: the vectorised answer.
        profile: how the call may compute.

    Raises:
        ReferencesDisagree: when the references do not agree, or the pure one finds the accused elements right.
    """
    pure = one_by_one(case, _on_cpu(inputs), profile)
    _require_agreement(case, quick, pure)
    for name, got in results.items():
        here = Expected(quick[name].value.cpu(), quick[name].variance.cpu())
        _require_excess(case, name, [got.cpu()], (here, pure[name]))


def _on_cpu(inputs: Inputs) -> Inputs:
    return Inputs(**{name: x.cpu() for name, x in inputs.named.items()})


def _compare(case: Case, inputs: Inputs, profile: Profile) -> None:
    """Both references on a kernel case, the vectorised one where the inputs are."""
    quick = batched.kernel_answer(case, inputs, profile, degrees=False)
    _require_agreement(case, quick, one_by_one(case, _on_cpu(inputs), profile))


def one_by_one(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Expected]:
    """The pure answer to a kernel case, without neighbours even of the same size, but in a crowd."""
    if len(case.packed_lengths) > _ONE_BY_ONE:
        return answer.kernel_answer(case, inputs, profile)
    return answer.kernel_answer(case, inputs, profile, pairs=0)


def _require_agreement(case: Case, quick: Mapping[str, Expected], pure: Mapping[str, Expected]) -> None:
    for name, expected in pure.items():
        got = quick[name].value.cpu()
        # What the dtype's roundings would be of, to make the budget: where a sum cancels, its terms do not.
        size = expected.value.abs() + expected.variance.sqrt() / UNIT_ROUNDOFF[case.dtype]
        differs = (got != expected.value) & ~((got - expected.value).abs() <= AGREEMENT * size)
        _require_none(case, name, differs, (got, expected.value))


def _require_excess(case: Case, name: str, results: Iterable[torch.Tensor], answers: tuple[Expected, Expected]) -> None:
    """Whether elements of results that are outside the quick answer's limits are outside the pure one's, too."""
    most, (quick, pure) = limit(case), answers
    for got in results:
        accused = deviations(case, got, quick) > most
        excused = deviations(case, got, pure) <= most * (1 - _BORDER)
        budgets = (quick.variance.sqrt(), pure.variance.sqrt())
        _require_none(case, f"the budget of {name}", accused & excused, budgets)


def _results(trial: Trial, name: str, pure: Expected) -> Iterable[torch.Tensor]:
    found = (observation.results.get(name) for observation in trial.observations)
    return (got for got in found if got is not None and got.shape == pure.value.shape)


def _require_none(case: Case, what: str, wrong: torch.Tensor, numbers: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raises for the first element about which the references disagree, if there is one."""
    if not wrong.any():
        return
    place = int(wrong.flatten().nonzero()[0])
    quick, pure = (each.flatten()[place].item() for each in numbers)
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), wrong.shape)]
    raise ReferencesDisagree(
        f"the harness's two references disagree, so that no backend is accused: of {case.in_short()} {what} at {index} "
        f"is {pure:.17g} one document at a time, and {quick:.17g} in the vectorised reference"
    )
