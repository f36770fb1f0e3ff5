"""Each check is needed: there is a planted fault that it alone sees, on a case on which the correct loop is clean."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.execution import poison
from attn_fuzz.execution.heap import fills_all
from attn_fuzz.oracle.checks import CHECKS, PROBES
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

WITNESSES = {
    "complete": ("X31", '{"level": "kernel", "lengths": [2], "head_dim": 4}'),
    "unwritten": ("X29", '{"level": "kernel", "lengths": [5, 3], "dtype": "bf16"}'),
    "dead_rows": ("M02-dk", '{"level": "kernel", "lengths": [1], "head_dim": 1, "capacity": 1}'),
    "inputs_intact": ("X02", '{"level": "kernel", "lengths": [5, 3]}'),
    "buffer_intact": (
        "M41-past",
        '{"level": "layer", "lengths": [1], "padding": 1, "cuts": [1], "head_dim": 1, "hidden": 1}',
    ),
    "results_kept": ("L05", '{"level": "layer", "lengths": [2], "cuts": [1], "head_dim": 1, "hidden": 1}'),
    "path": ("X11", '{"level": "kernel", "lengths": [5, 3], "heads": 2}'),
    "budget": ("M46-backward", '{"level": "kernel", "lengths": [3], "softcap": 3.0}'),
    "spread": ("X27", '{"level": "kernel", "lengths": [40, 9], "head_dim": 64, "dtype": "bf16"}'),
    "census": ("M16", '{"level": "kernel", "lengths": [2], "heads": 2, "head_dim": 32, "seed": 3}'),
    "support": (
        "F8",
        '{"level": "kernel", "lengths": [2, 2, 3], "heads": 4, "kv_heads": 2, "values": "tiny", '
        '"dtype": "fp16", "seed": 3}',
    ),
    "every_row": (
        "X28",
        '{"level": "kernel", "lengths": [129], "head_dim": 32, "values": "large", "dtype": "bf16", "seed": 1}',
    ),
    "needle": ("X06", '{"level": "kernel", "lengths": [1], "head_dim": 8}'),
    "exact_accumulation": (
        "R08",
        '{"level": "layer", "lengths": [2], "ranks": 2, "head_dim": 1, "hidden": 1, "dtype": "bf16"}',
    ),
    "additivity": (
        "M40-query",
        '{"level": "layer", "lengths": [3], "cuts": [2], "head_dim": 1, "hidden": 1, "dtype": "bf16"}',
    ),
    "swamping": ("X38", '{"level": "kernel", "lengths": [96], "head_dim": 2, "dtype": "bf16"}'),
    "asked": ("X33", '{"level": "kernel", "lengths": [1], "key_lengths": [2], "head_dim": 1}'),
    "isolation": ("X07", '{"level": "kernel", "lengths": [2]}'),
    "regrouping": ("M38-twice", '{"level": "layer", "lengths": [12]}'),
    "merging": ("S06", '{"level": "kernel", "lengths": [3], "head_dim": 1, "causal": false}'),
    "company": ("C01", '{"level": "kernel", "lengths": [2], "key_lengths": [8], "head_dim": 2}'),
    "placement": ("P03", '{"level": "kernel", "lengths": [3], "head_dim": 2, "loose_max_seqlen": [0, 1]}'),
    "replicas": ("R10", '{"level": "layer", "lengths": [1, 1], "ranks": 2}'),
    "repeatable": ("X32", '{"level": "kernel", "lengths": [5, 3], "dtype": "bf16"}'),
}


WITHOUT_ELEMENT = {"complete", "inputs_intact", "buffer_intact", "results_kept", "path"}
"""Checks of results that are missing, of memory that is no result, and of names."""


def failing(fault: str, case: Case) -> list[Symptom]:
    """What all checks see, probes asked even where others have failed."""
    trial = Trial(case, registry.load(f"fault:{fault}"), torch.device("cpu"))
    return [symptom for check in (*CHECKS, *PROBES) for symptom in check(trial)]


@pytest.mark.parametrize(
    ("check", "fault", "text"),
    # Ranks are processes.
    [
        pytest.param(check, *rest, marks=[pytest.mark.slow] if '"ranks"' in rest[1] else [])
        for check, rest in WITNESSES.items()
    ],
)
def test_a_check_has_a_fault_that_it_alone_sees(check: str, fault: str, text: str) -> None:
    if check == "unwritten" and not fills_all(poison.FINITE_BYTE):
        pytest.skip("needs a C library that fills what it hands out, as campaigns have it do")
    case = Case.from_json(text)
    symptoms = failing(fault, case)
    assert {symptom.check for symptom in symptoms} == {check}
    for symptom in symptoms:
        # Where it is, what came and what should have, as data: a sentence is for people.
        assert (symptom.element is None) == (check in WITHOUT_ELEMENT)
        if symptom.element is not None:
            assert symptom.element.got != symptom.element.expected or check == "spread"
    assert examine(case, registry.load("loop"), "cpu").symptoms == ()


def test_a_refusal_after_writing_is_seen_by_nothing_else() -> None:
    case = Case(level="kernel", lengths=(2,), softcap=20.0)
    verdict = examine(case, registry.load("fault:X30"), "cpu")
    assert verdict.checks == ("reject_or_correct",)
