"""Exact accumulation: whole-number gradients, summed over micro-sequences, stay whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.execution.runner import require_support
from attn_fuzz.oracle.checks.budget import place_of
from attn_fuzz.oracle.known_answer.accumulation import accumulation_probe
from attn_fuzz.oracle.known_answer.slack import holds_whole_numbers
from attn_fuzz.oracle.symptoms import Element, NotExact, Symptom
from attn_fuzz.oracle.trial import Trial


def exact_accumulation(trial: Trial) -> Iterator[Symptom]:
    """Float32 sums of what each micro-sequence and rank adds are exact: dV, the output projection's gradient."""
    if trial.case.level != "layer" or not holds_whole_numbers(trial.case, trial.profile):
        return
    conventions = trial.stated.conventions
    if not conventions.computes_padding and trial.case.padding_spans:
        # Padding is a document of the probe like any other.
        return
    if (probe := accumulation_probe(trial.case)) is None:
        return
    try:
        require_support(trial.backend, probe.case, trial.device)
    except UnsupportedCase:
        return
    second = dataclasses.replace(trial, case=probe.case)
    results = second.observe_with(probe.inputs, trial.poisons[0]).results
    for name, expected in probe.exact.items():
        if name == "dv" and conventions.gradient_rows == "consumed":
            # Nobody sees the whole sum.
            continue
        got = results.get(name)
        if got is None or got.dtype != torch.float32 or got.shape != expected.shape:
            continue
        wrong = got.double() != expected
        if wrong.any():
            first = int(wrong.flatten().nonzero()[0])
            place = place_of(second, name, first, got.shape)
            element = Element(place, got.flatten()[first].item(), expected.flatten()[first].item())
            yield NotExact(
                "exact_accumulation",
                name,
                f"{place}: {element.got:.6g} instead of the whole number {element.expected:.0f}; "
                f"{int(wrong.sum())} elements wrong",
                element=element,
            )
