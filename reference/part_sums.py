"""Sums over the tokens of micro-sequences, and of the sequences that they belong to, many of both at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.layout import Span, parts_of
from attn_fuzz.reference.monte_carlo import spread
from attn_fuzz.reference.transfer import transferred

_MOST: Final = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements of a product of several micro-sequences, of all samples: 2 MiB in float64, or 128."""


class Sums(NamedTuple):
    """What is added up to a parameter's gradient."""

    whole: torch.Tensor
    """``[calls, ...]``: of each sequence; without samples."""
    spread: torch.Tensor
    """``[calls, ...]``: the mean square of its samples' deviations."""
    terms: torch.Tensor
    """``[addends, ...]``: what each micro-sequence, or share of its heads, adds; without samples."""
    owner: torch.Tensor
    """int64 ``[addends]``: the sequence that each is added to."""
    squares: torch.Tensor
    """``[calls, ...]``: what the squares of everything that is added up in a sequence come to."""


class Parts:
    """Micro-sequences of several sequences, or ranks' shares of them.

    Args:
        calls: the tokens of each sequence, one behind another.
        parts: the tokens of each part, one behind another; each lies in one sequence, and none is empty.
        device: of the tensors.
    """

    def __init__(self, calls: Sequence[Span], parts: Sequence[Span], device: torch.device) -> None:
        self.spans, self.calls, self.parts, self.device = tuple(calls), len(calls), tuple(parts), device
        owners = [call for call, own in enumerate(parts_of(calls, parts)) for _ in own]
        self.owner = transferred(owners, device)
        """int64 ``[parts]``: the sequence of each."""
        by_length = sorted(range(len(calls)), key=lambda call: calls[call].length)
        self._by_length = tuple(calls[call] for call in by_length)
        """Sequences of about one length after one another: side by side, each is padded to the longest."""
        self._places = transferred(sorted(range(len(calls)), key=by_length.__getitem__), device)
        """int64 ``[calls]``: which of those each sequence is."""

    def of_heads(self, x: torch.Tensor, shares: int) -> Sums:
        """Sums of ``[samples, tokens, heads, channels]`` over tokens and heads; so many shares of these add apart."""
        lengths = transferred([part.length for part in self.parts], self.device)
        part = torch.repeat_interleave(lengths, output_size=x.shape[1])
        by_share = x.unflatten(2, (shares, -1)).sum(3)
        terms = x.new_zeros(len(x), len(self.parts), *by_share.shape[2:]).index_add_(1, part, by_share)
        whole = x.new_zeros(len(x), self.calls, x.shape[-1]).index_add_(1, self.owner, terms.sum(2))
        apart = spread(whole[1:] - whole[:1])
        squares = x.new_zeros(self.calls, x.shape[-1])
        squares.index_add_(0, self.owner[part], x[0].square().sum(1))
        return Sums(whole[0], apart, terms[0].flatten(0, 1), self.owner.repeat_interleave(shares), squares)

    def of_products(self, dy: torch.Tensor, x: torch.Tensor) -> Sums:
        """``dy.T @ x`` of each part, of ``[samples, tokens, rows]`` and ``[1 or samples, tokens, channels]``."""
        exact = dy[:1], x[:1]
        terms = torch.cat([each[0] for each in _products(*exact, self.parts)])
        whole = terms.new_zeros(self.calls, *terms.shape[1:]).index_add_(0, self.owner, terms)
        squared = _products(exact[0].square(), exact[1].square(), self.spans)
        squares = torch.cat([each[0] for each in squared])
        return Sums(whole, self._spread(dy, x), terms, self.owner, squares)

    def _spread(self, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Of the sums over each sequence; of some sequences after others, so that they stay in a processor's cache."""
        if len(dy) == len(x) == 1:
            return dy.new_zeros(self.calls, dy.shape[-1], x.shape[-1])
        if len(dy) > 1 and len(x) > 1:
            apart = [spread(each[1:] - each[:1]) for each in _products(dy, x, self._by_length)]
        else:
            # Where samples are on one side only, their deviations are products of that side's.
            sides = (dy[1:] - dy[:1], x) if len(dy) > 1 else (dy, x[1:] - x[:1])
            apart = [spread(each) for each in _products(*sides, self._by_length)]
        return torch.cat(apart).index_select(0, self._places)


def _products(dy: torch.Tensor, x: torch.Tensor, spans: Sequence[Span]) -> Iterator[torch.Tensor]:
    """``dy.T @ x`` over the tokens of each span, ``[samples, spans, rows, channels]``, of some spans after others."""
    samples, rows, channels = max(len(dy), len(x)), dy.shape[-1], x.shape[-1]
    most = _MOST.get(dy.device.type, _MOST["cuda"]) // samples
    for some in _chunks(spans, rows, channels, most):
        left, right = _padded(dy, x, some)
        if len(left) == len(right):
            yield left.transpose(-1, -2) @ right
        elif len(right) == 1:
            # Samples side by side: nothing has to be repeated for each.
            beside = left.permute(1, 0, 3, 2).flatten(1, 2)
            yield (beside @ right[0]).unflatten(1, (samples, rows)).transpose(0, 1)
        else:
            beside = right.permute(1, 2, 0, 3).flatten(2, 3)
            yield (left[0].transpose(-1, -2) @ beside).unflatten(2, (samples, channels)).permute(2, 0, 1, 3)


def _chunks(spans: Sequence[Span], rows: int, channels: int, most: int) -> Iterator[Sequence[Span]]:
    """As many spans as fit; a single one always does."""
    begin, longest = 0, 0
    for index, span in enumerate(spans):
        longest = max(longest, span.length)
        largest = max(rows * channels, longest * max(rows, channels))
        if index > begin and (index + 1 - begin) * largest > most:
            yield spans[begin:index]
            begin, longest = index, span.length
    yield spans[begin:]


def _padded(dy: torch.Tensor, x: torch.Tensor, spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of some spans, ``[samples, spans, longest, channels]``, of both sides of a product.

    Behind each span's tokens the side that is the smaller one has zeros, and the other one tokens of that span.
    """
    if len(spans) == 1:
        return dy[:, None, slice(*spans[0])], x[:, None, slice(*spans[0])]
    first, lengths = transferred([(span.begin, span.length) for span in spans], x.device)[..., None].unbind(1)
    row = torch.arange(max(span.length for span in spans), device=x.device)
    places = first + torch.minimum(row, lengths - 1)
    left, right = (each.index_select(1, places.flatten()).unflatten(1, places.shape) for each in (dy, x))
    (left if left.numel() < right.numel() else right).mul_((row < lengths)[..., None])
    return left, right
