"""Documents of a layer case side by side, and their results back in the order of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_fuzz.reference.layout import Span
from attn_fuzz.reference.simulated import SimulatedAttention

_TOGETHER = 64
"""Up to this length, documents are padded to the longest of their group; padding longer ones would cost too much."""


def groups_of(spans: Sequence[Span]) -> list[list[Span]]:
    """Documents that are evaluated side by side: short ones of about the same length; empty ones are left out."""
    groups: dict[int, list[Span]] = {}
    alone: list[list[Span]] = []
    for span in spans:
        if span.length > _TOGETHER:
            alone.append([span])
        elif span.length:
            groups.setdefault(max(4, 1 << (span.length - 1).bit_length()), []).append(span)
    return [*groups.values(), *alone]


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
        self._order = torch.tensor([place for _, place in sorted(places)], device=device)

    def __call__(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        """Each group's ``[samples, documents, heads, rows, d]`` as one ``[samples, tokens, heads, d]``."""
        return torch.cat([x.transpose(2, 3).flatten(1, 2) for x in results], 1).index_select(1, self._order)


def sum_of(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one tensor."""
    return torch.stack(list(terms)).sum(0)
