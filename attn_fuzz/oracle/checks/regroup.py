"""Regrouping: the same documents in another order, cut elsewhere, or on one rank, give the same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.execution.runner import require_support
from attn_fuzz.oracle.checks.budget import within_budget
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.symptoms import NotRegrouped, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.layout import document_spans


def turned(case: Case) -> Case | None:
    """The case with its first document last."""
    order = [*range(1, len(case.lengths)), 0]
    keys = None if case.key_lengths is None else tuple(case.key_lengths[index] for index in order)
    ids = case.packed_ids[: len(case.lengths)]
    try:
        return case.replace(
            lengths=tuple(case.lengths[index] for index in order),
            key_lengths=keys,
            document_ids=tuple(ids[index] for index in order),
        )
    except CaseError:
        return None


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
    return turned(case) if len(case.lengths) > 1 and case.memory != "broadcast" else None


def regrouped(trial: Trial) -> Iterator[Symptom]:
    """Documents in another order (kernel level), cuts elsewhere or one rank (layer level): within the same budget."""
    case = trial.case
    other = regrouped_case(case)
    if other is None:
        return
    count = len(case.packed_lengths)
    order = list(range(count)) if case.level == "layer" else [*range(1, count), 0]
    try:
        require_support(trial.backend, other, trial.device)
    except UnsupportedCase:
        return
    second = dataclasses.replace(trial, case=other)
    got = second.observe(trial.poisons[0]).results
    # Values belong to documents, so the answer is the one there is, in the new order; sums over micro-sequences are
    # rounded elsewhere, which a second look with a budget of its own settles.
    suspects = [
        name
        for name, expected in trial.answer.items()
        if name in got and not _within(trial, other, name, got[name], _reordered(case, name, expected, order))
    ]
    if not suspects:
        return
    for symptom in within_budget(second):
        what = "with its first document last" if case.level == "kernel" else f"cut at {list(other.cuts)}"
        what = "on one rank" if other.all_ranks != case.all_ranks else what
        yield NotRegrouped(
            "regrouping", symptom.tensor, f"{what}: {symptom.message}", z=symptom.z, element=symptom.element
        )


def _within(trial: Trial, other: Case, name: str, got: torch.Tensor, expected: Expected) -> bool:
    return got.shape != expected.value.shape or not bool((deviations(trial.case, got, expected) > limit(other)).any())


def _reordered(case: Case, name: str, expected: Expected, order: list[int]) -> Expected:
    """Rows of a result in the new order of documents."""
    if name.startswith("d_"):
        return expected
    lengths = case.packed_key_lengths if name in ("dk", "dv") else case.packed_lengths
    spans = document_spans(lengths)
    rows = torch.cat([torch.arange(*spans[index]) for index in order])
    degrees = None if expected.degrees is None else expected.degrees[rows]
    return Expected(expected.value[rows], expected.variance[rows], degrees)
