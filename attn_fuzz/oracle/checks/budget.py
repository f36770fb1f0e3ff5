"""Budget: every element of every result is within the error that correct arithmetic may make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from attn_fuzz.oracle.deviations import LIMIT, STRUCTURED, beyond_doubt, deviations, limit
from attn_fuzz.oracle.symptoms import Element, Place, Symptom, wrong_tensor
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.memory import same_bits


def first_deviations(trial: Trial, name: str) -> torch.Tensor:
    """``deviations`` of a result of the first run, which has the shape of the answer; not to be written to."""
    if name not in trial.first_deviations:
        got, expected = trial.observations[0].results[name], trial.answer[name]
        trial.first_deviations[name] = deviations(trial.case, got, expected)
    return trial.first_deviations[name]


def _deviations(trial: Trial, name: str, got: torch.Tensor, answer: dict[str, Expected]) -> torch.Tensor:
    """``deviations`` of any run's result from an answer."""
    if answer is trial.answer and got is trial.observations[0].results.get(name):
        return first_deviations(trial, name)
    return deviations(trial.case, got, answer[name])


_LOOK_AGAIN: Final = 8.0
"""Beyond this the quick layer budgets may themselves be what is off."""


def worst_errors(trial: Trial) -> dict[str, float]:
    """Largest z per result over all observations, by careful budgets where it is large."""
    worst = _largest(trial, trial.answer)
    if trial.case.level == "layer" and any(z > _LOOK_AGAIN for z in worst.values()):
        return _largest(trial, trial.careful_answer)
    return worst


def _largest(trial: Trial, answer: dict[str, Expected]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for name, got in _distinct_results(trial):
        expected = answer.get(name)
        if expected is not None and got.shape == expected.value.shape and got.numel():
            # Where structured values allow for more, in units in which the verdict is at LIMIT as elsewhere.
            z = _deviations(trial, name, got, answer).max().item() * LIMIT / limit(trial.case)
            worst[name] = max(z, worst.get(name, 0.0))
    return worst


def _distinct_results(trial: Trial) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and results of all observations, those left out whose bits the first one has, as nearly all have."""
    first, *others = trial.observations
    yield from first.results.items()
    for observation in others:
        for name, got in observation.results.items():
            if name not in first.results or not same_bits(got, first.results[name]):
                yield name, got


HISTOGRAM_STEP: Final = 0.5
HISTOGRAM_BINS: Final = 24
"""z from 0 to 12; the last bin holds everything beyond."""


def histograms(trial: Trial) -> dict[str, list[int]]:
    """Elements by z per result, for kernel cases with continuous values: what the backend's profile rests on."""
    counted: dict[str, list[int]] = {}
    if trial.case.level != "kernel" or limit(trial.case) > LIMIT or trial.case.values in STRUCTURED:
        return counted
    for name, got in trial.observations[0].results.items():
        expected = trial.answer.get(name)
        if expected is not None and got.shape == expected.value.shape and got.numel():
            places = (first_deviations(trial, name) / HISTOGRAM_STEP).clamp_max_(HISTOGRAM_BINS - 1).long()
            # What owes its bits goes into a bin of its own, which is left out.
            places.masked_fill_(expected.variance == 0, HISTOGRAM_BINS)
            counted[name] = torch.bincount(places.flatten(), minlength=HISTOGRAM_BINS + 1)[:HISTOGRAM_BINS].tolist()
    return counted


def _suspects(trial: Trial, answer: dict[str, Expected]) -> dict[str, torch.Tensor]:
    """z of the results that exceed the limit, by name; non-finite observations belong to other checks' runs."""
    found: dict[str, torch.Tensor] = {}
    for name, got in _distinct_results(trial):
        expected = answer.get(name)
        if expected is None or got.shape != expected.value.shape or name in found:
            continue
        z = _deviations(trial, name, got, answer)
        if not z.numel() or not z.max() > limit(trial.case):
            continue
        if name in ("dk", "dv", "dq"):
            # Dead rows have a check of their own, which names them.
            z = torch.where((expected.variance == 0) & (expected.value == 0), 0.0, z)
        if z.max() > limit(trial.case):
            found[name] = z
    return found


def place_of(trial: Trial, name: str, flat_index: int, shape: torch.Size) -> Place:
    """Document, row, head and channel of an element."""
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat_index), shape)]
    document, row = trial.document_of(name, index[0])
    if name == "lse":
        return Place(document, row, index[1])
    return Place(document, row, index[1] if len(index) == 3 else None, index[-1] if len(index) > 1 else None)


_WHENCE: Final = "; NaN whatever unwritten memory holds: it comes from arithmetic"


def within_budget(trial: Trial) -> Iterator[Symptom]:
    """Fails beyond LIMIT on two independent value seeds of the same layout, judged by careful budgets.

    What is beyond doubt fails at once.
    """
    if not _suspects(trial, trial.answer):
        return
    suspects = _suspects(trial, trial.careful_answer)
    if not suspects:
        return
    again = _suspects(trial.second, trial.second.careful_answer)
    for name, z in suspects.items():
        if name not in again and not z.max() > beyond_doubt(trial.case):
            continue
        worst = int(z.argmax())
        expected = trial.careful_answer[name].value
        got = next(o.results[name] for o in trial.observations if _is_source(trial, o.results[name], name, z))
        place = place_of(trial, name, worst, z.shape)
        wrong = z > limit(trial.case)
        wrong_rows = wrong.flatten(1).any(1).nonzero()[:, 0].tolist() if z.dim() > 1 else []
        element = Element(place, got.flatten()[worst].item(), expected.flatten()[worst].item())
        documents = sorted({d for row in wrong_rows if (d := trial.document_of(name, row)[0]) is not None})
        named = documents if len(documents) <= _MOST_NAMED else f"{str(documents[:8])[:-1]}, ...]"
        of_documents = f" in documents {named}" if documents else ""
        yield wrong_tensor(name)(
            "budget",
            name,
            f"{place}: got {element.got:.6g}, expected {element.expected:.6g}, z = {z.flatten()[worst].item():.3g}; "
            f"{int(wrong.sum())} of {z.numel()} elements wrong{of_documents}{_WHENCE if element.nan else ''}",
            z=z.flatten()[worst].item(),
            element=element,
            failing=_failing(trial, name, wrong),
        )


_MOST_NAMED: Final = 64
"""Documents, in a sentence."""


def _failing(trial: Trial, name: str, wrong: torch.Tensor) -> dict[str, str]:
    """How far the wrong elements of a result reach, in words that do not depend on sizes; empty for parameters."""
    if name.startswith("d_") or wrong.dim() < 2:
        return {}
    by_row = wrong.flatten(1).any(1)
    owners = [trial.document_of(name, row)[0] for row in range(len(wrong))]
    hit = {owner for owner, bad in zip(owners, by_row.tolist(), strict=True) if bad}
    theirs = torch.tensor([owner in hit for owner in owners])
    reached = {"documents": (len(hit), len(set(owners))), "rows": (int(by_row.sum()), int(theirs.sum()))}
    if wrong.dim() == 3:
        reached["heads"] = int(wrong.any(2).any(0).sum()), wrong.shape[1]
    if name != "lse":
        channels = wrong.flatten(0, -2).any(0)
        reached["channels"] = int(channels.sum()), len(channels)
    return {what: "all" if some == every else "one" if some == 1 else "some" for what, (some, every) in reached.items()}


def _is_source(trial: Trial, got: torch.Tensor, name: str, z: torch.Tensor) -> bool:
    """Whether ``z`` was measured on this result."""
    worst = int(z.argmax())
    expected = trial.careful_answer[name]
    mine = deviations(trial.case, got, expected).flatten()[worst]
    return bool(mine == z.flatten()[worst])
