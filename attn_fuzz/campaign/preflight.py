"""Why a user's function or class is none that can be tested, as plain cases have shown it, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attn_fuzz.backends import registry
from attn_fuzz.campaign.isolated import Report
from attn_fuzz.execution.process import MISSING_VARIABLE, NOT_DIFFERENTIABLE

NO_KERNEL: Final = (
    "ImportError",
    "ModuleNotFoundError",
    "NameError",
    "UnboundLocalError",
    "AttributeError",
    "KeyError",
    MISSING_VARIABLE,
    NOT_DIFFERENTIABLE,
)
"""Kinds of exceptions that say that something is missing in or around a kernel, not that it computes wrongly."""


def _said(report: Report) -> str:
    """What is wrong with what a kernel did, in words of its own."""
    if report.error == NOT_DIFFERENTIABLE:
        return (
            "its output has no gradient; make it differentiable by autograd, from q, k and v, or declare that it has a "
            "forward only by its attribute capabilities = {'backward': False}"
        )
    if report.error == MISSING_VARIABLE:
        name = report.said.removeprefix("KeyError: ").partition(" (")[0]
        return f"it reads the environment variable {name}, which is not set; set it, or give it a default"
    return report.said


def why_unusable(name: str, reports: Sequence[Report]) -> str | None:
    """Why a kernel is none that can be tested, in one sentence, where every plain case says so."""
    if not all(report.error in NO_KERNEL or report.symptom == "MissingResult" for report in reports):
        return None
    return f"{name.removeprefix(registry.USER_LAYER)} cannot be tested: {_said(reports[0])}"
