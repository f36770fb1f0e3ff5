"""Every saved case under tests/regressions: clean on every backend here, failing on those it convicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase

from attn_fuzz.findings.regression_cases import Seed, regression_seeds
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reduction.call_sequence import in_company

SEEDS = regression_seeds(Path(__file__).parent / "regressions")


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_seed_is_clean(seed: Seed, attn_backend: str, attn_device: str) -> None:
    backend = registry.load(attn_backend)
    if (reason := backend.kernel.why_unavailable(attn_device.partition(":")[0])) is not None:
        pytest.skip(f"{attn_backend}: {reason}")
    try:
        verdict = in_company(examine(seed.case, backend, attn_device), seed.company, backend, torch.device(attn_device))
    except UnsupportedCase as refusal:
        pytest.skip(str(refusal))
    assert [str(symptom) for symptom in verdict.symptoms] == []


@pytest.mark.parametrize(
    ("seed", "name"),
    [
        pytest.param(seed, name, id=f"{seed.name}-{name}")
        for seed in SEEDS
        for name in sorted({name for names in seed.convicts.values() for name in names})
    ],
)
def test_seed_convicts(seed: Seed, name: str, attn_device: str) -> None:
    backend = registry.load(name)
    if name not in seed.convicts.get(attn_device.partition(":")[0], ()):
        pytest.skip(f"{name} need not fail on {attn_device}")
    if (reason := backend.kernel.why_unavailable(attn_device.partition(":")[0])) is not None:
        pytest.skip(f"{name}: {reason}")
    try:
        verdict = examine(seed.case, backend, attn_device)
    except UnsupportedCase as refusal:
        pytest.skip(str(refusal))
    assert set(verdict.checks) & {"dead_rows", "unwritten"}, "the known-bad backend was not convicted"
