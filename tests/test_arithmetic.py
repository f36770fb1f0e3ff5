"""Budgets of arithmetic that a user declares, against kernels that compute so, with all their roundings emulated."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from emulated import ALL_SUMS, KINDS, How, bf16, cut_off, fp16, kernel, to_nearest

from attn_fuzz.backends.user import _CAUTIOUS
from attn_fuzz.oracle.deviations import deviations, row_spreads
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.monte_carlo import Arithmetic
from attn_fuzz.reference.narrow import LARGEST_ERROR, Narrow, operand_variance
from attn_fuzz.reference.profile import Profile


def largest(how: How, case: Case, facts: dict[str, Any]) -> tuple[dict[str, float], float]:
    """(largest z of each result, largest row statistic) of a kernel, under the profile of a user's with some facts."""
    inputs = kernel_inputs(case, "cpu")
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    bounds, keys = (torch.tensor([0, *itertools.accumulate(x)]) for x in (case.lengths, case.packed_key_lengths))
    out = kernel(how)(*leaves, bounds, keys, 0, 0, causal=case.causal)
    results = {"out": out, **dict(zip(ALL_SUMS, torch.autograd.grad(out, leaves, inputs.dout), strict=True))}
    expected = kernel_answer(case, inputs, dataclasses.replace(_CAUTIOUS, **{"stores_partial_sums": True, **facts}))
    z = {name: deviations(case, x.detach(), expected[name]).max().item() for name, x in results.items()}
    rows = max(row_spreads(case, x.detach(), expected[name]).max().item() for name, x in results.items())
    return z, rows


SHAPES = [(1, True, 1), (8, False, 2), (64, True, 1), (64, False, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("values", ["gaussian", "large", "offset", "tiny", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_computes_as_declared_is_within_its_budget(kind: str, values: str) -> None:
    how, facts, dtype = KINDS[kind]
    undeclared: list[float] = []
    for index, (head_dim, causal, group) in enumerate(SHAPES):
        lengths = (300,) if index % 2 else (1, 33, 70)
        case = Case(
            level="kernel",
            lengths=lengths,
            heads=2,
            kv_heads=2 // group,
            head_dim=head_dim,
            causal=causal,
            dtype=dtype,
            values=values,
            seed=index,
        )
        z, rows = largest(how, case, facts)
        assert max(z.values()) < 6, (case, z)
        if values in ("gaussian", "large"):
            assert rows < 0.8, case
        undeclared.append(max(largest(how, case, {})[0].values()))
    # Sums of so few tiles are hardly worse than one; half precision hides a little of P.
    if "atomic" not in kind and values in ("gaussian", "large", "ties"):
        assert max(undeclared) > 7


def test_many_tiles_of_atomic_sums_are_beyond_the_default_and_within_what_is_declared() -> None:
    plain = Case(level="kernel", lengths=(3000,), heads=1, kv_heads=1, head_dim=32, causal=False, dtype="bf16")
    few_keys, few_rows = (plain.replace(lengths=(a,), key_lengths=(b,)) for a, b in ((3000, 20), (20, 3000)))
    for case, name in ((few_rows, "dq"), (few_keys, "dk"), (few_keys, "dv")):
        how = How(atomic=(name,))
        # As on a GPU: what user code is allowed on a CPU, torch's partial sums, is nearly as much.
        assert largest(how, case, {"stores_partial_sums": False})[0][name] > 10
        z, rows = largest(how, case, {"atomic_sums": frozenset({name})})
        assert max(z.values()) < 6
        assert rows < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [12, 40])
def test_a_key_that_is_missing_shows_all_the_same(kind: str, keys: int) -> None:
    how, facts, dtype = KINDS[kind]
    case = Case(level="kernel", lengths=(keys,), heads=2, head_dim=16, causal=False, dtype=dtype)
    z, _ = largest(dataclasses.replace(how, drops=True), case, facts)
    assert min(z.values()) > 10, z


# The pieces.


@pytest.mark.parametrize("rounded", [cut_off, to_nearest])
def test_the_second_moment_of_tf32_is_that_of_cutting_off(rounded: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (3 * 2 ** torch.rand(200_000, generator=generator, dtype=torch.float64)).float().double()
    error = rounded(x) - x
    share = (error.square() / operand_variance(x, "tf32")).mean()
    assert share.item() == pytest.approx(1.0 if rounded is cut_off else 0.25, rel=0.03)
    assert (error.abs() / x.abs()).max() <= LARGEST_ERROR["tf32"]
    if rounded is cut_off:
        assert -(error / x).mean().item() == pytest.approx(0.36 * 2.0**-10, rel=0.02)


@pytest.mark.parametrize(("form", "rounded"), [("bf16", bf16), ("fp16", fp16)])
def test_the_second_moment_of_half_precision(form: str, rounded: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (2 ** torch.rand(200_000, generator=generator, dtype=torch.float64)).float().double()
    for magnitude in (1.0, 2.0**-18) if form == "fp16" else (1.0,):
        error = rounded(magnitude * x) - magnitude * x
        assert (error.square() / operand_variance(magnitude * x, form)).mean().item() == pytest.approx(1.0, rel=0.06)
    assert operand_variance(torch.zeros(1, dtype=torch.float64), form).item() == 0.0


def test_what_is_far_below_the_range_of_fp16_may_vanish_and_no_more() -> None:
    x = torch.tensor([2.0**-30], dtype=torch.float64)
    assert operand_variance(x, "fp16").item() == 2.0**-60
    assert operand_variance(torch.tensor([2.0**-127], dtype=torch.float64), "tf32").item() == 2.0**-254


def test_nothing_is_narrow_where_nothing_is_declared() -> None:
    for dtype in ("fp32", "bf16", "fp16"):
        assert Narrow.of(dtype, Profile()) is None
        assert Narrow.of(dtype, _CAUTIOUS) is None
    # What the case has anyway is no fact about it.
    assert Narrow.of("bf16", Profile(products="bf16")) is None
    assert Narrow.of("fp16", dataclasses.replace(_CAUTIOUS, scores_dtype="fp16", probabilities_dtype="fp16")) is None
    assert Narrow.of("fp16", Profile(scores_dtype="fp16")) is not None


def test_tf32_holds_half_precision() -> None:
    """Inputs are operands as they are; P and dS are not."""
    narrow = Narrow.of("fp16", Profile(products="tf32"))
    assert narrow is not None
    x = torch.ones(2, 3, dtype=torch.float64)
    assert not narrow.of_input(x).any()
    assert narrow.of_weights(x).all()
    assert narrow.cut == 0.0
    assert narrow.weights == LARGEST_ERROR["tf32"]


@pytest.mark.parametrize("rows", [1, 1 << 14])
def test_samples_have_noise_of_their_own_however_many_numbers_they_take(rows: int) -> None:
    arithmetic = Arithmetic("fp32", "cpu", seed=3, samples=4)
    x = torch.zeros(1, rows, 64, dtype=torch.float64)
    noise = arithmetic.perturb(x, torch.ones_like(x[0]))[1:]
    assert noise.shape == (4, rows, 64)
    assert 0.7 < noise.std() < 1.3
    if rows > 1:
        flat = noise.flatten(1)
        # More than are kept: of 4 samples each, 1,048,576 numbers.
        assert (torch.corrcoef(flat) - torch.eye(4, dtype=torch.float64)).abs().max() < 0.01
        assert all((flat[a] != flat[b]).all() for a in range(4) for b in range(a))
        again = arithmetic.perturb(x, torch.ones_like(x[0]))[1:].flatten(1)
        assert torch.corrcoef(torch.stack([flat[0], again[0]]))[0, 1].abs() < 0.01
