"""A first look in float32 leaves the verdict on every document as it is."""

from __future__ import annotations

import pytest
import torch
from answered import answers_asked

from attn_fuzz.backends import registry
from attn_fuzz.batch.batch_run import BatchRun
from attn_fuzz.batch.verdicts import COLUMNS, OFF, largest_z
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import VALUES, Case

CPU = torch.device("cpu")
CASE = Case(
    level="kernel",
    lengths=(3, 6, 0, 9, 2, 5, 4, 8, 1),
    key_lengths=(3, 13, 2, 17, 9, 1, 8, 8, 1),
    heads=4,
    kv_heads=2,
    head_dim=8,
    dtype="bf16",
)


def run(case: Case, name: str) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """A call's inputs, and what a backend makes of them."""
    found = BatchRun(CallBatch.of_one(case), registry.load(name), CPU, "nan", 1, lambda: None)
    return found.drawn, found.first


def both(case: Case, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``largest_z`` in float64, and with a first look."""
    inputs, results = run(case, name)
    profile = registry.load(name).kernel.profile_on("cpu")
    exact, looked = (largest_z(case, inputs, profile, [results], first_look=look)[0] for look in (False, True))
    return exact, looked


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", ["loop", "fault:M51-swapped", "fault:M25-one", "fault:M12"])
def test_verdicts_are_the_same(name: str, values: str, dtype: str) -> None:
    for seed in range(3):
        exact, looked = both(CASE.replace(values=values, dtype=dtype, seed=seed), name)
        assert torch.equal(exact > LIMIT, looked > LIMIT)
        doubtful = ~(looked < LIMIT - OFF).all(1)
        # Judged again, the same to the bit or the order of sums.
        assert torch.allclose(exact[doubtful], looked[doubtful], rtol=1e-6)
        assert torch.allclose(exact[~doubtful], looked[~doubtful], atol=0.5)


@pytest.mark.parametrize("scale", [1e18, 1e-30])
def test_budgets_that_overflow_or_vanish_in_float32_are_a_doubt(scale: float) -> None:
    exact, looked = both(CASE.replace(values="large", scale=scale), "loop")
    assert torch.allclose(exact, looked, atol=0.5)


@pytest.mark.parametrize("wrong", [1e-30, 1e-20])
def test_what_differs_where_bits_are_owed_is_seen(wrong: float) -> None:
    """Rows without keys are zero; of what else they are the square is nothing in float32."""
    case = CASE.replace(lengths=(3, 1), key_lengths=(1, 1))
    inputs, results = run(case, "loop")
    profile = registry.load("loop").kernel.profile_on("cpu")
    assert not results["out"][:2].any()
    results["out"][1] = wrong
    for look in (False, True):
        z = largest_z(case, inputs, profile, [results], first_look=look)
        assert z[0, :, COLUMNS.index("out")].isinf().tolist() == [True, False]


def test_only_documents_in_doubt_are_answered_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, results = run(CASE, "loop")
    results["out"][3:5] += 1.0
    asked = answers_asked(monkeypatch)
    z = largest_z(CASE, inputs, registry.load("loop").kernel.profile_on("cpu"), [results], first_look=True)
    assert asked == [(torch.float32, None), (torch.float64, [1])]
    assert (z[0] > LIMIT).any(1).nonzero()[:, 0].tolist() == [1]
