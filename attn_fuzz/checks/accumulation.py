"""Exact accumulation: whole-number gradients, summed over micro-sequences, stay whole (attn_fuzz/probes.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from attn_fuzz.execute import require_support
from attn_fuzz.probes import accumulation_probe
from attn_fuzz.symptoms import NotExact, Symptom
from attn_fuzz.trial import Trial
from backends.kernel import UnsupportedCase


def exact_accumulation(trial: Trial) -> Iterator[Symptom]:
    """dV in a float32 gradient buffer is an exact sum of what each micro-sequence and rank adds."""
    if trial.case.level != "layer" or (probe := accumulation_probe(trial.case)) is None:
        return
    try:
        require_support(trial.backend, probe.case, trial.device)
    except UnsupportedCase:
        return
    second = dataclasses.replace(trial, case=probe.case)
    got = second.observe_with(probe.inputs, trial.poisons[0]).results.get("dv")
    if got is None or got.dtype != torch.float32 or got.shape != probe.dv.shape:
        return
    wrong = got.double() != probe.dv
    if wrong.any():
        row, head, channel = (int(i) for i in wrong.nonzero()[0])
        document, within = trial.document_of("dv", row)
        yield NotExact(
            "exact_accumulation",
            "dv",
            f"document {document}, row {within}, head {head}, channel {channel}: {got[row, head, channel].item():.6g} "
            f"instead of the whole number {probe.dv[row, head, channel].item():.0f}; {int(wrong.sum())} elements wrong",
        )
