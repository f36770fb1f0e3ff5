"""Fused answers agree with the exact ones, and so do the verdicts that they give.

Runs on a CUDA device, or anywhere under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.batch import fused_look
from attn_fuzz.batch.batch_run import BatchRun
from attn_fuzz.batch.fused_look import disagreement, distances
from attn_fuzz.batch.verdicts import COLUMNS, OFF, largest_z
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.reference import batched
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.fused_answer import fused_answer, rows_of, unsupported_reason
from attn_fuzz.reference.profile import Profile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_cuda_only = pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device or TRITON_INTERPRET=1"
    ),
]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ALL = Profile(stores_probabilities=True, expands_kv=True, normalises_by_lse=True, exp_error=2.0**-19)
BASE = Case(
    level="kernel",
    lengths=(3, 37, 0, 5, 20),
    key_lengths=(7, 70, 4, 0, 11),
    heads=2,
    kv_heads=1,
    head_dim=16,
    dtype="bf16",
)
CHANGES: list[dict[str, object]] = [
    {},
    {"causal": False},
    {"window": (5, -1)},
    {"causal": False, "window": (3, 9), "softcap": 5.0},
    {"values": "large", "head_dim": 64},
    {"values": "offset", "head_dim": 24},
    {"heads": 3, "kv_heads": 3, "head_dim": 8, "scale": 0.5},
]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("profile", [Profile(), ALL], ids=["default", "all"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_answers_are_within_hundredths_of_a_standard_deviation(
    changes: dict[str, object], profile: Profile, dtype: str
) -> None:
    case = BASE.replace(dtype=dtype, **changes)
    assert unsupported_reason(case, profile) is None
    inputs = kernel_inputs(case, DEVICE)
    fused, exact = fused_answer(case, inputs, profile), batched.kernel_answer(case, inputs, profile)
    for name, expected in exact.items():
        value, deviation = fused[name].value.double(), expected.variance.sqrt()
        owed = expected.variance == 0
        # So are variances that float32 does not hold.
        strict = fused[name].inverse.isinf()
        assert strict[owed].all(), name
        assert (expected.variance[strict] < 1.1e-30).all(), name
        assert torch.equal(value[owed], expected.value[owed]), name
        z = torch.where(value == expected.value, 0.0, (value - expected.value).abs() / deviation)
        # The LSE is a float32 result itself, and the exponentials and logarithms of GPUs are good to a few ulp.
        assert z[~strict].max() < (1.5 if name == "lse" else 0.05), name
        ratio = fused[name].inverse.double() * deviation
        assert (ratio[~strict] - 1).abs().max() < 0.01, name
        if (degrees := fused[name].degrees) is not None:
            # Of smaller variances float32 has no squares, and then the strictest bound is taken.
            rows, squared = ~owed.any(-1), expected.variance.sum(-1) > 1e-14
            assert expected.degrees is not None
            more = degrees / expected.degrees - 1
            assert more[rows & squared].abs().max() < 0.03, name
            assert more[rows].min() > -0.03, name
    assert disagreement(distances(fused, exact)) is None


@pytest.mark.parametrize("scale", [1e18, 1e-30])
def test_budgets_that_float32_does_not_hold_let_nothing_pass(scale: float) -> None:
    case = BASE.replace(values="large", scale=scale)
    inputs = kernel_inputs(case, DEVICE)
    fused, exact = fused_answer(case, inputs, Profile()), batched.kernel_answer(case, inputs, Profile())
    for name, expected in exact.items():
        inverse = fused[name].inverse
        lost = (expected.variance < 0.9e-30) | (expected.variance > 1.1e37)
        assert inverse[lost].isinf().all(), name
        got = torch.where(fused[name].value == 0, 1.0, 2 * fused[name].value)
        assert rows_of(got, fused[name])[0].isinf()[lost.flatten(2).any(2) if lost.dim() == 3 else lost].all(), name


def test_rows_have_their_largest_deviation_and_their_mean() -> None:
    inputs = kernel_inputs(BASE, DEVICE)
    dq = fused_answer(BASE, inputs, Profile())["dq"]
    got = dq.value.clone()
    assert all((found == 0).all() for found in rows_of(got, dq))
    got[3, 1, 2] = torch.nan
    got[5, 0, 0] += 20 / dq.inverse[5, 0, 0]
    worst, mean = rows_of(got, dq)
    assert worst[3, 1].isinf()
    assert worst[5, 0].item() == pytest.approx(20, rel=1e-2)
    assert mean[5, 0].item() == pytest.approx(400 / BASE.head_dim, rel=2e-2)
    assert worst.count_nonzero() == mean.count_nonzero() == 2


@on_cuda_only
@pytest.mark.parametrize("name", ["loop", "fault:M51-swapped", "fault:M25-one", "fault:M12"])
def test_verdicts_are_those_of_the_exact_answer(name: str) -> None:
    """As a campaign meets them: the kind is compiled when it is met again, then compared, then used."""
    case = BASE.replace(lengths=BASE.lengths * 210, key_lengths=BASE.key_lengths * 210, head_dim=64, heads=4)
    backend = registry.load(name)
    ran = BatchRun(CallBatch.of_one(case), backend, DEVICE, "nan", 1, lambda: None)
    inputs, results = ran.drawn, ran.first
    profile = backend.kernel.profile_on("cuda")
    if unsupported_reason(case, profile) is not None:
        pytest.skip("its profile has terms of its own")
    for _ in range(2):
        fused_look.look(case, inputs, profile)
        fused_look.settle()
    assert fused_look.look(case, inputs, profile) is not None, fused_look.state(case, inputs.q.device)
    exact, looked = (largest_z(case, inputs, profile, [results], first_look=each)[0] for each in (False, True))
    assert torch.equal(exact > LIMIT, looked > LIMIT)
    sure = (looked < LIMIT - OFF).all(1)
    off = (exact - looked)[sure].abs().amax(0)
    assert off[COLUMNS.index("lse")] < 4.0
    assert (off < 0.5).sum() >= len(COLUMNS) - 1
    assert sure.sum() >= 0.9 * ((exact < LIMIT - OFF).all(1)).sum()
