"""Sums over the tokens of micro-sequences, and of the sequences that they belong to, many of both at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.layout import Span, parts_of

_MOST: Final = 1 << 22
"""Elements of a product of several micro-sequences: 32 MiB in float64."""


class Sums(NamedTuple):
    """What is added up to a parameter's gradient."""

    whole: torch.Tensor
    """``[samples, calls, ...]``: of each sequence."""
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
        parts: the tokens of each part, one behind another; each lies in one sequence.
        device: of the tensors.
    """

    def __init__(self, calls: Sequence[Span], parts: Sequence[Span], device: torch.device) -> None:
        self.calls, self.parts, self.device = len(calls), parts, device
        owners = [call for call, own in enumerate(parts_of(calls, parts)) for _ in own]
        self.owner = torch.tensor(owners, device=device)
        """int64 ``[parts]``: the sequence of each."""

    def of_heads(self, x: torch.Tensor, shares: int) -> Sums:
        """Sums of ``[samples, tokens, heads, channels]`` over tokens and heads; so many shares of these add apart."""
        lengths = torch.tensor([part.length for part in self.parts], device=self.device)
        part = torch.repeat_interleave(lengths, output_size=x.shape[1])
        by_share = x.unflatten(2, (shares, -1)).sum(3)
        terms = x.new_zeros(len(x), len(self.parts), *by_share.shape[2:]).index_add_(1, part, by_share)
        whole = x.new_zeros(len(x), self.calls, x.shape[-1]).index_add_(1, self.owner, terms.sum(2))
        squares = x.new_zeros(self.calls, x.shape[-1])
        squares.index_add_(0, self.owner[part], x[0].square().sum(1))
        return Sums(whole, terms[0].flatten(0, 1), self.owner.repeat_interleave(shares), squares)

    def of_products(self, dy: torch.Tensor, x: torch.Tensor) -> Sums:
        """``dy.T @ x`` of each part, of ``[samples, tokens, rows]`` and ``[1 or samples, tokens, channels]``."""
        samples, rows, channels = max(len(dy), len(x)), dy.shape[-1], x.shape[-1]
        whole = dy.new_zeros(samples, self.calls, rows, channels)
        squares, terms = whole.new_zeros(whole.shape[1:]), []
        for begin, end in self._chunks(samples, rows, channels):
            owner = self.owner[begin:end]
            left, right = (self._padded(each, begin, end) for each in (dy, x))
            products = left.transpose(-1, -2) @ right
            whole.index_add_(1, owner, products.expand(samples, *products.shape[1:]))
            squares.index_add_(0, owner, left[0].square().transpose(-1, -2) @ right[0].square())
            terms.append(products[0])
        return Sums(whole, torch.cat(terms), self.owner, squares)

    def _chunks(self, samples: int, rows: int, channels: int) -> Iterator[tuple[int, int]]:
        """First part, and one past the last, of as many as fit; a single one always does."""
        begin, longest = 0, 0
        for index, part in enumerate(self.parts):
            longest = max(longest, part.length)
            largest = max(rows * channels, longest * max(rows, channels))
            if index > begin and samples * (index + 1 - begin) * largest > _MOST:
                yield begin, index
                begin, longest = index, part.length
        yield begin, len(self.parts)

    def _padded(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Some parts' tokens, ``[samples, parts, longest, channels]``, with zeros behind each."""
        parts = self.parts[begin:end]
        if len(parts) == 1:
            return x[:, None, slice(*parts[0])]
        first, lengths = torch.tensor([(part.begin, part.length) for part in parts], device=self.device).unbind(1)
        row = torch.arange(max(part.length for part in parts), device=self.device)
        there = row < lengths[:, None]
        places = torch.where(there, first[:, None] + row, 0)
        taken = x.index_select(1, places.flatten()).unflatten(1, places.shape)
        return taken * there[..., None]
