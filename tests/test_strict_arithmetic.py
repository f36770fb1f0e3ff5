"""Promises of less rounding: whoever keeps one is within its budget, and whoever breaks one only within the default."""

from __future__ import annotations

import dataclasses
from typing import Any

import emulated
import pytest
import torch
from emulated import How, kernel

from attn_fuzz.backends.arithmetic import NAMED
from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import _CAUTIOUS, UserKernel
from attn_fuzz.oracle.checks.budget import worst_errors
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

CASE = Case(level="kernel", lengths=(40, 23), heads=2, head_dim=32, values="gaussian")
FLOAT32 = How(keeps_weights=True, keeps_ds=True, exact_delta=True, by_head=emulated.exactly)
"""Nothing is rounded but results."""
FUSED = How(by_head=emulated.exactly)
"""P and dS are, for their products."""

BROKEN: dict[str, tuple[How, How, str]] = {
    "rounds_probabilities": (dataclasses.replace(FLOAT32, keeps_weights=False), FLOAT32, "float32"),
    "rounds_ds": (dataclasses.replace(FLOAT32, keeps_ds=False), FLOAT32, "float32"),
    "delta_from_output": (dataclasses.replace(FLOAT32, exact_delta=False), FLOAT32, "float32"),
    "rounds_scores": (dataclasses.replace(FUSED, stored_scores=True), FUSED, "fused"),
    "scales_inputs": (dataclasses.replace(FUSED, scaled_query=emulated.bf16), FUSED, "fused"),
    "rounds_dp": (dataclasses.replace(FLOAT32, stored_dp=True), FLOAT32, "float32"),
}
"""By the fact that is promised to be False: a kernel that breaks that promise only, one that keeps it, and a name that
has it."""


def largest(how: How, arithmetic: object, dtype: str, **changes: Any) -> float:
    """The largest z of some cases."""
    emulated.strict = kernel(how)  # type: ignore[attr-defined]
    if arithmetic is not None:
        emulated.strict.capabilities["arithmetic"] = arithmetic  # type: ignore[attr-defined]
    mine = UserKernel("emulated:strict")
    backend = Backend("emulated:strict", mine, levels=("kernel",))
    worst = 0.0
    for seed in range(2):
        case = CASE.replace(dtype=dtype, seed=seed, **changes)
        trial = Trial(case, backend, torch.device("cpu"), ("none",), interfered=False)
        worst = max(worst, *worst_errors(trial).values())
    return worst


@pytest.mark.parametrize("fact", BROKEN)
def test_a_broken_promise_is_seen_by_whoever_has_it_made(fact: str) -> None:
    breaks, keeps, name = BROKEN[fact]
    # Where logits are large, what is rounded on the way to them is largest.
    changes = {"values": "large"} if fact in ("rounds_scores", "scales_inputs") else {}
    assert largest(breaks, None, "bf16", **changes) < LIMIT
    assert largest(breaks, name, "bf16", **changes) > LIMIT
    assert largest(keeps, name, "bf16", **changes) < LIMIT


@pytest.mark.parametrize("values", ["gaussian", "large", "offset", "tiny"])
@pytest.mark.parametrize(
    ("how", "name", "dtype"), [(FLOAT32, "float32", "fp16"), (FUSED, "fused", "fp16"), (FUSED, "float32", "fp32")]
)
def test_what_keeps_its_promises_is_within_its_budget(how: How, name: str, dtype: str, values: str) -> None:
    assert largest(how, name, dtype, values=values) < LIMIT


def test_names_stand_for_facts_that_are_stricter_than_the_default() -> None:
    for facts in NAMED.values():
        for fact, value in facts.items():
            assert value is False
            # Of what may be torch's flash attention, on CPUs.
            assert getattr(_CAUTIOUS, fact) is (fact != "stores_partial_sums")
    assert set(NAMED["float32"]) - set(NAMED["fused"]) == {"rounds_probabilities", "rounds_ds", "delta_from_output"}
