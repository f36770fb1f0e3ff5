"""Rotary embeddings of the layer under test (backends/rotary.py), beside the formula and autograd."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.backends.rotary import Rotary
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import rotary_frequencies

CPU = torch.device("cpu")
CASES = {
    "default": Case(level="layer", lengths=(9,), rotary="default", head_dim=16),
    "other base": Case(level="layer", lengths=(9,), rotary="default", head_dim=8, rotary_theta=500.0),
    "proportional": Case(level="layer", lengths=(9,), rotary="proportional", head_dim=16, rotary_fraction=0.25),
}
POSITIONS = torch.tensor([0, 1, 2, 0, 1, 7], dtype=torch.int32)


def formula(case: Case, x: torch.Tensor) -> torch.Tensor:
    """Pair c of a token at position p as a complex number, times ``exp(i p f_c)``; float64."""
    angles = POSITIONS.double()[:, None] * rotary_frequencies(case, CPU)
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_turned_by_their_position_and_gradients_back(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(6, 2, case.head_dim, generator=generator).to(dtype) for _ in range(2))
    leaf = x.clone().requires_grad_()
    turned = Rotary(case, 9, CPU)(leaf, POSITIONS)
    turned.backward(dy)
    exact = x.double().requires_grad_()
    expected = formula(case, exact)
    expected.backward(dy.double())
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert turned.dtype == leaf.grad.dtype == dtype  # type: ignore[union-attr]
    torch.testing.assert_close(turned.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=rounding, atol=rounding)  # type: ignore[union-attr]


def test_layers_of_one_configuration_have_their_tables_in_common() -> None:
    one, other = (Rotary(CASES["default"], positions, CPU) for positions in (9, 12))
    assert one.tables is other.tables
    assert len(Rotary(CASES["default"], 40, CPU).tables) >= 40
    assert Rotary(CASES["other base"], 9, CPU).tables is not one.tables


def test_tables_made_where_nothing_is_differentiated_serve_where_it_is() -> None:
    case = CASES["default"].replace(rotary_theta=777.0)
    with torch.inference_mode():
        Rotary(case, 9, CPU)
    leaf = torch.ones(6, 2, 16, requires_grad=True)
    Rotary(case, 9, CPU)(leaf, POSITIONS).sum().backward()
    assert leaf.grad is not None


def test_nothing_is_turned_where_there_is_no_rotary() -> None:
    x = torch.ones(6, 2, 16)
    assert Rotary(Case(level="layer", lengths=(9,), head_dim=16), 9, CPU)(x, POSITIONS) is x
