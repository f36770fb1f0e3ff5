"""Sums over the query rows of documents that micro-sequences share (reference/shares.py), beside plain loops."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.reference.attention import sum_groups
from attn_fuzz.reference.layout import Span
from attn_fuzz.reference.rounding import rounding_variance
from attn_fuzz.reference.shares import Shares, product

# Documents, micro-sequences, and which rows of which document each share has.
LAYOUTS = {
    "cut twice": ([(0, 4), (4, 9)], [(0, 2), (2, 6), (6, 9)], [(0, 0, 2), (0, 2, 4), (1, 0, 2), (1, 2, 5)]),
    "one document": ([(3, 8)], [(0, 4), (4, 6), (6, 8)], [(0, 0, 1), (0, 1, 3), (0, 3, 5)]),
    "not cut": ([(0, 4), (4, 9)], [(0, 4), (4, 9)], [(0, 0, 4), (1, 0, 5)]),
    "one of three": ([(0, 3), (3, 5), (5, 6)], [(0, 4), (4, 6)], [(0, 0, 3), (1, 0, 1), (1, 1, 2), (2, 0, 1)]),
}


class Drawn:
    """Shares of a layout, and tensors of its documents."""

    def __init__(self, layout: str) -> None:
        spans, parts, self.expected = LAYOUTS[layout]
        self.lengths = [end - begin for begin, end in spans]
        rows = max(self.lengths)
        self.shares = Shares(
            [Span(*span) for span in spans], [Span(*part) for part in parts], rows, torch.device("cpu")
        )
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.rand(len(spans), 4, rows, rows, dtype=torch.float64, generator=generator)
        self.x = torch.randn(len(spans), 4, rows, 2, dtype=torch.float64, generator=generator)
        for document, length in enumerate(self.lengths):
            self.weights[document, :, length:] = 0

    def terms(self, heads: int) -> torch.Tensor:
        """What each share comes to, row by row and head by head."""
        found = []
        for document, begin, end in self.expected:
            own = [
                self.weights[document, :, row, :, None] * self.x[document, :, row, None] for row in range(begin, end)
            ]
            found.append(torch.stack(own).sum(0).unflatten(0, (-1, heads)).sum(1))
        return torch.stack(found)


@pytest.fixture(params=LAYOUTS)
def drawn(request: pytest.FixtureRequest) -> Drawn:
    return Drawn(request.param)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_each_share_is_summed_by_itself(drawn: Drawn, heads: int) -> None:
    terms = drawn.terms(heads)
    products = sum_groups(drawn.shares.products(drawn.weights, drawn.x), heads)
    torch.testing.assert_close(products, terms, rtol=1e-12, atol=0)
    # Together they are the document's.
    torch.testing.assert_close(
        drawn.shares.added(terms), product(drawn.weights, drawn.x, heads), rtol=1e-12, atol=1e-15
    )


def test_each_running_sum_is_stored_the_last_first(drawn: Drawn) -> None:
    terms = drawn.terms(2)
    # A micro-sequence that adds nothing rounds nothing.
    terms[0, :, 1] = 0
    expected = torch.zeros(len(drawn.lengths), *terms.shape[1:], dtype=torch.float64)
    for document in range(len(drawn.lengths)):
        own = [term for (owner, _, _), term in zip(drawn.expected, terms, strict=True) if owner == document][::-1]
        running = own[0]
        for term in own[1:]:
            running = running + term
            expected[document] += rounding_variance(running, "bf16").masked_fill(term == 0, 0.0)
    got = drawn.shares.stored_variance(terms, "bf16")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert bool(got.any()) == (len(drawn.expected) > len(drawn.lengths))


def test_rows_of_one_share_are_beside_one_another(drawn: Drawn) -> None:
    expected = torch.zeros_like(drawn.shares.beside)
    for document, begin, end in drawn.expected:
        expected[document, begin:end, begin:end] = True
    assert torch.equal(drawn.shares.beside, expected)
