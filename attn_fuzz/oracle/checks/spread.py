"""Spread: no element may be outside its budget, and yet a whole row too far off.

One key among thousands moves each channel of a row by a few standard deviations only, but it moves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_fuzz.oracle.checks.budget import first_deviations
from attn_fuzz.oracle.deviations import CONTINUOUS, LIMIT, limit, spread_of
from attn_fuzz.oracle.symptoms import Element, Place, Symptom, WrongSpread
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case


def _judged(case: Case) -> bool:
    return case.level == "kernel" and case.values in CONTINUOUS and limit(case) <= LIMIT


def spreads(trial: Trial) -> dict[str, torch.Tensor]:
    """The row statistic of every result that has one."""
    found: dict[str, torch.Tensor] = {}
    if not _judged(trial.case):
        return found
    for name, expected in trial.answer.items():
        got = trial.observations[0].results.get(name)
        if expected.degrees is not None and got is not None and got.shape == expected.value.shape and got.numel():
            found[name] = spread_of(first_deviations(trial, name), expected)
    return found


def worst_spreads(trial: Trial) -> dict[str, float]:
    """Largest row statistic per result, as ``out-rows``, in units in which the verdict is at LIMIT."""
    return {f"{name}-rows": LIMIT * rows.max().item() for name, rows in spreads(trial).items()}


def _outside(trial: Trial, name: str) -> bool:
    return bool((first_deviations(trial, name) > LIMIT).any())


def rows_within_budget(trial: Trial) -> Iterator[Symptom]:
    """Fails where a row's mean z^2 is beyond what independent errors make, on two value seeds of the same layout."""
    wide = {name: rows for name, rows in spreads(trial).items() if rows.max() > 1}
    if not wide:
        return
    again = spreads(trial.second)
    for name, rows in wide.items():
        if name not in again or again[name].max() <= 1:
            continue
        if all(_outside(each, name) for each in (trial, trial.second)):
            # The budget names it, by element.
            continue
        row, head = (int(i) for i in torch.unravel_index(rows.argmax(), rows.shape))
        document, within = trial.document_of(name, row)
        z = first_deviations(trial, name)[row, head]
        channel = int(z.argmax())
        both = trial.observations[0].results[name], trial.answer[name].value
        element = Element(Place(document, within, head, channel), *(x[row, head, channel].item() for x in both))
        mean = z.square().mean().item()
        yield WrongSpread(
            "spread",
            name,
            f"document {document}, row {within}, head {head}: mean z^2 over its channels is {mean:.3g}, "
            f"{rows[row, head].item() ** 2:.3g} times what independent roundings make; {int((rows > 1).sum())} rows",
            z=LIMIT * rows[row, head].item(),
            element=element,
        )
