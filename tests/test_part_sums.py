"""Sums over the tokens of micro-sequences and of their sequences (reference/part_sums.py), beside plain loops."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.reference import part_sums
from attn_fuzz.reference.layout import Span
from attn_fuzz.reference.part_sums import Parts

CALLS = [Span(0, 5), Span(5, 6), Span(6, 13)]
PARTS = [Span(0, 2), Span(2, 5), Span(5, 6), Span(6, 7), Span(7, 13)]
OWNER = [0, 0, 1, 2, 2]
SAMPLES = {"on both sides": (4, 4), "of the gradient": (4, 1), "of the input": (1, 4), "none": (1, 1)}


def drawn(samples: int, channels: int, seed: int) -> torch.Tensor:
    """``[samples, 13, channels]``: the first is exact, the others stray a little from it."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(1, 13, channels, dtype=torch.float64, generator=generator)
    noise = 1e-3 * torch.randn(samples - 1, 13, channels, dtype=torch.float64, generator=generator)
    return torch.cat([exact, exact + noise])


@pytest.mark.parametrize("most", [1, 1 << 18], ids=["one after another", "side by side"])
@pytest.mark.parametrize("samples", SAMPLES)
def test_products_are_summed_over_parts_and_over_sequences(
    samples: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(part_sums._MOST, "cpu", most)
    of_dy, of_x = SAMPLES[samples]
    dy, x = drawn(of_dy, 3, 1), drawn(of_x, 6, 2)
    sums = Parts(CALLS, PARTS, torch.device("cpu")).of_products(dy, x)

    def product(span: Span) -> torch.Tensor:
        return sum(dy[:, row, :, None] * x[:, row, None] for row in range(*span))  # type: ignore[return-value]

    whole = [product(call) for call in CALLS]
    squares = [sum(dy[0, row, :, None] ** 2 * x[0, row] ** 2 for row in range(*call)) for call in CALLS]
    close = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(sums.terms, torch.stack([product(part)[0] for part in PARTS]), **close)
    torch.testing.assert_close(sums.whole, torch.stack([each[0] for each in whole]), **close)
    torch.testing.assert_close(sums.squares, torch.stack(squares), **close)
    apart = [(each[1:] - each[:1]).square().sum(0) / max(len(each) - 1, 1) for each in whole]
    torch.testing.assert_close(sums.spread, torch.stack(apart), rtol=1e-6, atol=0.0)
    assert sums.owner.tolist() == OWNER
