"""Documents of a layer case side by side, and their results back in the order of tokens."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from attn_fuzz.reference.layout import Span
from attn_fuzz.reference.simulated import SimulatedAttention
from attn_fuzz.reference.transfer import transferred

_ROWS: Final = {"cpu": (4, 8, 16, 32, 64), "cuda": (5, 17, 33, 65, 129)}
"""Documents of up to so many rows are padded to the longest of them; longer ones are alone, since padding them would
cost too much. Telling a GPU what to do takes longer than doing it with some more rows: it has fewer groups, which end
where drawn lengths do."""

_MOST: Final = 1 << 23
"""Scores of a group, of all samples: 64 MiB in float64, and more than ten such tensors are alive at once."""


def groups_of(spans: Sequence[Span], scores: int, device: torch.device) -> list[list[Span]]:
    """Documents that are evaluated side by side: short ones of about the same length; empty ones are left out.

    Args:
        spans: of all documents.
        scores: how many each pair of a query and a key has: heads, times samples.
        device: where they are evaluated.
    """
    groups: dict[int, list[Span]] = {}
    alone: list[list[Span]] = []
    sizes = _ROWS.get(device.type, _ROWS["cuda"])
    for span in spans:
        if span.length > sizes[-1]:
            alone.append([span])
        elif span.length:
            groups.setdefault(sizes[bisect.bisect_left(sizes, span.length)], []).append(span)
    parts = [_in_parts(some, max(1, _MOST // (scores * rows**2))) for rows, some in groups.items()]
    return [*itertools.chain.from_iterable(parts), *alone]


def _in_parts(spans: Sequence[Span], most: int) -> Iterator[list[Span]]:
    """As many spans after others as a group may have."""
    return (list(spans[begin : begin + most]) for begin in range(0, len(spans), most))


class Packed:
    """Results of groups of documents, back in the order of tokens.

    Args:
        groups: all documents that are not empty.
        device: of the results.
    """

    def __init__(self, groups: Sequence[SimulatedAttention], device: torch.device) -> None:
        places: list[tuple[int, int]] = []
        offset = 0
        for group in groups:
            for document, span in enumerate(group.spans):
                first = offset + document * group.rows
                places += [(span.begin + row, first + row) for row in range(span.length)]
            offset += len(group.spans) * group.rows
        self._order = transferred([place for _, place in sorted(places)], device)

    def __call__(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        """Each group's ``[samples, documents, heads, rows, d]`` as one ``[samples, tokens, heads, d]``."""
        return torch.cat([x.transpose(2, 3).flatten(1, 2) for x in results], 1).index_select(1, self._order)


def sum_of(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one tensor."""
    return torch.stack(list(terms)).sum(0)
