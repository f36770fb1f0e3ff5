"""Sums over the query rows of documents side by side, which micro-sequences share: one sum in each of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from attn_fuzz.reference.layout import Span, meeting
from attn_fuzz.reference.rounding import rounding_variance
from attn_fuzz.reference.transfer import transferred


class Shares:
    """The share of each document that each micro-sequence has, a document's one after another.

    Args:
        spans: where the documents lie in the packed sequence; none is empty.
        parts: micro-sequences.
        rows: of every document's tensors, at least as many as the longest has.
        device: of the tensors.
    """

    def __init__(self, spans: Sequence[Span], parts: Sequence[Span], rows: int, device: torch.device) -> None:
        self.documents, self.rows, self.device = len(spans), rows, device
        self._shares = [
            (document, Span(max(part.begin, span.begin) - span.begin, min(part.end, span.end) - span.begin))
            for document, span in enumerate(spans)
            for part in meeting(span, parts)
        ]
        self.whole = len(self._shares) == self.documents
        """Whether no document is shared."""

    @functools.cached_property
    def owner(self) -> torch.Tensor:
        """int64 ``[shares]``: the document of each."""
        return transferred([document for document, _ in self._shares], self.device)

    @functools.cached_property
    def own(self) -> torch.Tensor:
        """bool ``[shares, rows]``: the rows of each."""
        bounds = transferred([tuple(rows) for _, rows in self._shares], self.device)
        row = torch.arange(self.rows, device=self.device)
        return (row >= bounds[:, :1]) & (row < bounds[:, 1:])

    @functools.cached_property
    def beside(self) -> torch.Tensor:
        """bool ``[documents, rows, rows]``: whether two rows are of one share."""
        pairs = (self.own[:, :, None] & self.own[:, None, :]).int()
        return pairs.new_zeros(self.documents, self.rows, self.rows).index_add_(0, self.owner, pairs) > 0

    @functools.cached_property
    def _turns(self) -> torch.Tensor:
        """int64 ``[documents, turns]``: the shares of each document, the last first; behind them what is none."""
        by_document: list[list[int]] = [[] for _ in range(self.documents)]
        for index, (document, _) in enumerate(self._shares):
            by_document[document].insert(0, index)
        turns = max(map(len, by_document))
        none = len(self._shares)
        return transferred([own + [none] * (turns - len(own)) for own in by_document], self.device)

    def products(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``weights.T @ x`` over the query rows of each share, ``[shares, heads, rows, d]``.

        Args:
            weights: ``[documents, heads, rows, rows]``.
            x: ``[documents, heads, rows, d]``.
        """
        if self.whole:
            return product(weights, x)
        if self.documents == 1:
            rows = [slice(*rows) for _, rows in self._shares]
            return torch.cat([product(weights[..., own, :], x[..., own, :]) for own in rows])
        masked = weights.index_select(0, self.owner).mul_(self.own[:, None, :, None])
        return product(masked, x.index_select(0, self.owner))

    def added(self, terms: torch.Tensor) -> torch.Tensor:
        """``[shares, ...]`` to the sums over each document's, ``[documents, ...]``."""
        if self.whole:
            return terms
        return terms.new_zeros(self.documents, *terms.shape[1:]).index_add_(0, self.owner, terms)

    def stored_variance(self, terms: torch.Tensor, dtype: str) -> torch.Tensor:
        """What storing each running sum of ``[shares, ...]`` in a dtype does to each document's sum, the last first."""
        in_turn = torch.cat([terms, terms.new_zeros(1, *terms.shape[1:])])[self._turns]
        running, *later = in_turn.unbind(1)
        variance = torch.zeros_like(running)
        for term in later:
            running = running + term
            # Adding nothing rounds nothing: earlier micro-sequences have not met later keys.
            variance += torch.where(term == 0, 0.0, rounding_variance(running, dtype))
        return variance


def product(weights: torch.Tensor, x: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """``weights.T @ x`` of ``[..., heads, rows, ...]`` over the rows of so many heads, which follow one another."""
    left, right = (each.unflatten(-3, (-1, heads)).flatten(-3, -2) for each in (weights, x))
    return left.transpose(-1, -2) @ right
