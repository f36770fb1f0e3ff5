"""A saved case, run again: alone or among the calls that it takes, and in another process where it may end its own."""

from __future__ import annotations

import contextlib
import sys

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.campaign.isolated import FATAL, Isolated, Subject
from attn_fuzz.campaign.pool import HANG_SECONDS
from attn_fuzz.findings.regression_cases import RegressionCase
from attn_fuzz.oracle.checks import PROBES, RARE
from attn_fuzz.oracle.examine import Verdict, examine
from attn_fuzz.oracle.symptoms import NotCompiled
from attn_fuzz.reduction.call_sequence import verdict_among


def verdict_alone(saved: RegressionCase, name: str, device: str) -> Verdict | str:
    """What a backend makes of a saved case by itself, or why it refuses.

    Args:
        saved: the case.
        name: of the backend.
        device: where.
    """
    if saved.symptom in FATAL:
        child = Isolated(Subject(name, device), HANG_SECONDS)
        try:
            symptom = child.fatal(saved.case)
        finally:
            child.close()
        if symptom is not None:
            return Verdict((symptom,), {}, frozenset())
    try:
        # What a kernel prints is not what a command prints.
        with contextlib.redirect_stdout(sys.stderr):
            rare = RARE if saved.symptom == NotCompiled.__name__ else ()
            return examine(saved.case, registry.load(name), device, probes=(*PROBES, *rare))
    except UnsupportedCase as refusal:
        return str(refusal)


def verdict_on(saved: RegressionCase, name: str, device: str) -> Verdict | str:
    """``verdict_alone``, and where that is clean the verdict among the calls that the case was saved with."""
    alone = verdict_alone(saved, name, device)
    if isinstance(alone, str):
        return alone
    with contextlib.redirect_stdout(sys.stderr):
        return verdict_among(alone, saved.sequence, registry.load(name), torch.device(device))
