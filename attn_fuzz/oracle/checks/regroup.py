"""Regrouping: the same documents in another order, cut elsewhere, or on one rank, give the same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.execution.runner import require_support
from attn_fuzz.oracle.checks.budget import within_budget
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.relations.reordered import Reordered
from attn_fuzz.oracle.symptoms import NotRegrouped, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.case import Case, CaseError


def recut(case: Case) -> Case | None:
    """On one rank where it was spread over several; uncut where it was cut; otherwise cut in the middle."""
    if case.all_ranks > 1:
        return case.replace(ranks=1, tensor_ranks=1)
    cuts = () if case.cuts else (case.tokens // 2,)
    try:
        return case.replace(cuts=cuts)
    except CaseError:
        return None


def regrouped_case(case: Case) -> Case | None:
    """The same documents in the other arrangement that is tried, or None."""
    if case.level == "layer":
        return recut(case)
    reordered = Reordered.turned(case)
    return None if reordered is None else reordered.after


def regrouped(trial: Trial) -> Iterator[Symptom]:
    """Documents in another order (kernel level), cuts elsewhere or one rank (layer level): within the same budget."""
    case = trial.case
    reordered = Reordered.turned(case) if case.level == "kernel" else None
    other = recut(case) if case.level == "layer" else reordered.after if reordered else None
    if other is None:
        return
    try:
        require_support(trial.backend, other, trial.device)
    except UnsupportedCase:
        return
    second = dataclasses.replace(trial, case=other)
    got = second.observe(trial.poisons[0]).results
    # Values belong to documents, so the answer is the one there is; sums over micro-sequences are rounded elsewhere,
    # which a second look with a budget of its own settles.
    got = reordered.back(got) if reordered else got
    if all(_within(trial, other, got[name], expected) for name, expected in trial.answer.items() if name in got):
        return
    for symptom in within_budget(second):
        what = "with its first document last" if case.level == "kernel" else f"cut at {list(other.cuts)}"
        what = "on one rank" if other.all_ranks != case.all_ranks else what
        yield NotRegrouped(
            "regrouping", symptom.tensor, f"{what}: {symptom.message}", z=symptom.z, element=symptom.element
        )


def _within(trial: Trial, other: Case, got: torch.Tensor, expected: Expected) -> bool:
    return got.shape != expected.value.shape or not bool((deviations(trial.case, got, expected) > limit(other)).any())
