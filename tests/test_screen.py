"""The fast reference agrees with the exact one, and the fused values with the portable ones, bit by bit.

Runs on a CUDA device, or anywhere under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from attn_fuzz.reference import batched, values
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.screen import row_maxima, screen, unsupported_reason
from attn_fuzz.reference.values import DTYPES, draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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
def test_screen_is_within_hundredths_of_a_standard_deviation(
    changes: dict[str, object], profile: Profile, dtype: str
) -> None:
    case = BASE.replace(dtype=dtype, **changes)
    inputs = kernel_inputs(case, DEVICE)
    screened, exact = screen(case, inputs, profile), batched.kernel_answer(case, inputs, profile)
    for name, expected in exact.items():
        value, deviation = screened[name].value.double(), expected.variance.sqrt()
        owed = expected.variance == 0
        assert torch.equal(screened[name].inverse.isinf(), owed), name
        assert torch.equal(value[owed], expected.value[owed]), name
        z = torch.where(value == expected.value, 0.0, (value - expected.value).abs() / deviation)
        # The LSE is a float32 result itself, and the exponentials and logarithms of GPUs are good to a few ulp.
        assert z[~owed].max() < (1.5 if name == "lse" else 0.05), name
        ratio = screened[name].inverse.double() * deviation
        assert (ratio[~owed] - 1).abs().max() < 0.01, name


def test_row_maxima() -> None:
    inputs = kernel_inputs(BASE, DEVICE)
    dq = screen(BASE, inputs, Profile())["dq"]
    got = dq.value.clone()
    assert (row_maxima(got, dq) == 0).all()
    got[3, 1, 2] = torch.nan
    got[5, 0, 0] += 20 / dq.inverse[5, 0, 0]
    worst = row_maxima(got, dq)
    assert worst[3].isinf()
    assert worst[5].item() == pytest.approx(20, rel=1e-2)
    assert worst.count_nonzero() == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("mode", ["gaussian", "large", "offset", "tiny"])
def test_values_have_the_same_bits(mode: str, dtype: str) -> None:
    if INTERPRETED and dtype == "bf16":
        pytest.skip("the interpreter truncates where hardware rounds")
    case = BASE.replace(values=mode, dtype=dtype, seed=7)
    for name in ("q", "k"):
        portable = draw(case, name, 3, 24, "cpu")
        rows = values.document_rows(case.packed_ids, case.packed_lengths, DEVICE)
        fused = values._fused(rows, name, mode, case.seed, 3, 24, DTYPES[dtype])
        assert torch.equal(fused.cpu(), portable), name


def test_what_the_screen_leaves_to_the_exact_reference() -> None:
    cuda = torch.device("cuda")
    if not INTERPRETED:
        assert values.fused_agrees(cuda)
        assert unsupported_reason(BASE, Profile(), cuda) is None
        assert unsupported_reason(BASE, ALL, cuda) is None
    for case in (BASE.replace(dtype="fp32"), BASE.replace(values="tiny"), BASE.replace(head_dim=256)):
        assert unsupported_reason(case, Profile(), cuda)
    assert unsupported_reason(BASE, Profile(rounds_scores=True), cuda)
    assert unsupported_reason(BASE, Profile(), torch.device("cpu"))
