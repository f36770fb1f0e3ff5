"""Placement: looser bounds than the longest document, rows between documents, and rows far apart move no bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.cases.compact import compact
from attn_fuzz.execution.observation import Observation, differing
from attn_fuzz.execution.runner import require_support
from attn_fuzz.oracle.checks.memory import first_difference
from attn_fuzz.oracle.symptoms import MovedByPlacement, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case


def placed_otherwise(trial: Trial) -> Iterator[Symptom]:
    """The call laid out plainly gives the same bits, where the backend promises that no placement moves any."""
    plain = compact(trial.case, trial.stated.placement_keeps_bits)
    if plain == trial.case:
        return
    try:
        require_support(trial.backend, plain, trial.device)
    except UnsupportedCase:
        return
    other = dataclasses.replace(trial, case=plain)

    def run() -> Observation:
        return other.observe_with(trial.inputs, trial.poisons[0])

    laid_out, first = run(), trial.observe(trial.poisons[0])
    for name in differing(laid_out, first):
        if trial.moves_for(name, run):
            yield MovedByPlacement(
                "placement",
                name,
                f"its bits are not those of the same call with {_words(trial.case, plain)}",
                element=first_difference(trial, name, laid_out, first),
            )


def _words(case: Case, plain: Case) -> str:
    """What the plain call has otherwise."""
    words = {
        "loose_max_seqlen": "max_seqlen of the longest document",
        "gaps": "no rows between documents",
        "memory": "rows close together",
    }
    return " and ".join(words[name] for name in words if getattr(case, name) != getattr(plain, name))
