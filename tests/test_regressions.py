"""Every saved case under tests/regressions: clean on every backend here, failing where failures are expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase

from attn_fuzz.findings.regression_cases import RegressionCase, regression_cases
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reduction.call_sequence import interferes

SEEDS = regression_cases(Path(__file__).parent / "regressions")


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_seed_is_clean(seed: RegressionCase, attn_backend: str, attn_device: str) -> None:
    backend = registry.load(attn_backend)
    if (reason := backend.kernel.why_unavailable(attn_device.partition(":")[0])) is not None:
        pytest.skip(f"{attn_backend}: {reason}")
    try:
        verdict = interferes(
            examine(seed.case, backend, attn_device), seed.sequence, backend, torch.device(attn_device)
        )
    except UnsupportedCase as refusal:
        pytest.skip(str(refusal))
    assert [str(symptom) for symptom in verdict.symptoms] == []


@pytest.mark.parametrize(
    ("seed", "name"),
    [
        pytest.param(seed, name, id=f"{seed.name}-{name}")
        for seed in SEEDS
        for name in sorted({name for names in seed.expected_failures.values() for name in names})
    ],
)
def test_seed_convicts(seed: RegressionCase, name: str, attn_device: str) -> None:
    backend = registry.load(name)
    if name not in seed.expected_failures.get(attn_device.partition(":")[0], ()):
        pytest.skip(f"{name} need not fail on {attn_device}")
    if (reason := backend.kernel.why_unavailable(attn_device.partition(":")[0])) is not None:
        pytest.skip(f"{name}: {reason}")
    try:
        verdict = examine(seed.case, backend, attn_device)
    except UnsupportedCase as refusal:
        pytest.skip(str(refusal))
    assert set(verdict.checks) & {"dead_rows", "unwritten"}, "the known-bad backend was not convicted"
