"""Why a user's function or class is none that can be tested, as plain cases have shown it, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from attn_fuzz.backends import registry
from attn_fuzz.campaign.isolated import Report
from attn_fuzz.execution.process import NOT_DIFFERENTIABLE

NO_KERNEL: Final = (
    "ImportError",
    "ModuleNotFoundError",
    "NameError",
    "UnboundLocalError",
    "AttributeError",
    "KeyError",
)
"""Exceptions that say that something is missing in or around a kernel, rather than that it computes wrongly."""


_LABEL: Final = re.compile(r"^\w+ \[\w+\] [\w ]+: ")
"""The check and place before what a symptom says."""


def _said(report: Report) -> str:
    """What is wrong with what a kernel did, in words of its own."""
    said = _LABEL.sub("", report.message)
    if report.error == NOT_DIFFERENTIABLE:
        return "its output has no gradient; make it differentiable by autograd, from q, k and v"
    if report.error == "KeyError" and "<frozen os>" in said:
        name = said.removeprefix("KeyError: ").partition(" (")[0]
        return f"it reads the environment variable {name}, which is not set; set it, or give it a default"
    return said


def why_unusable(name: str, reports: Sequence[Report]) -> str | None:
    """Why a kernel is none that can be tested, in one sentence, where every plain case says so."""
    unusable = (*NO_KERNEL, NOT_DIFFERENTIABLE)
    if not all(report.error in unusable or report.symptom == "MissingResult" for report in reports):
        return None
    return f"{name.removeprefix(registry.USER_LAYER)} cannot be tested: {_said(reports[0])}"
