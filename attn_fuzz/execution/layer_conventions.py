"""What a run of a layer does about its conventions (reference/conventions.py), and how it runs in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

import torch

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.conventions import Conventions

EVALUATED: Final = ("out", "k", "v")
"""Results of a layer that is run without autograd."""

_PADDED: Final = {"zero": ("k", "v"), "skipped": ("out", "dx", "k", "v", "dk", "dv")}
"""By what is declared of padding: results whose rows of it are nobody's affair."""

Pair = tuple[torch.Tensor, torch.Tensor]


def without_autograd(case: Case) -> AbstractContextManager[object]:
    """``torch.no_grad`` or ``torch.inference_mode``: evaluation is run under either.

    A bit of the case's seed decides, which the second value seed leaves as it is.
    """
    return torch.inference_mode() if case.seed & 4 else torch.no_grad()


def without_padding(results: dict[str, torch.Tensor], case: Case, conventions: Conventions) -> None:
    """Writes zeros to rows of padding that may hold anything, as the reference has them.

    Args:
        results: copies of what came back, which are written to.
        case: whose.
        conventions: what is declared of padding.
    """
    for name in _PADDED.get(conventions.padding, ()):
        for begin, end in case.padding_spans if name in results else ():
            results[name][begin:end] = 0


class GradientRows:
    """K/V gradient rows of each micro-sequence as they are when its own backward begins, which may write over them.

    Args:
        look: gives the live gradient buffer, or None where there is none to see.
    """

    def __init__(self, look: Callable[[], Pair | None]) -> None:
        self._look = look
        self._rows: list[tuple[int, Pair | None]] = []

    def take(self, begin: int, end: int) -> None:
        """Copies the rows ``[begin, end)`` of the micro-sequence whose backward comes next: the last ones first."""
        live = self._look()
        copies = None if live is None else (live[0].detach()[begin:end].clone(), live[1].detach()[begin:end].clone())
        self._rows.append((end - begin, copies))

    def values(self) -> Pair | None:
        """dk and dv of all tokens; a buffer that was not there yet had nothing added to it."""
        like = next((copies for _, copies in self._rows if copies is not None), None)
        if like is None:
            return None
        rows = [
            copies if copies is not None else tuple(x.new_zeros(count, *x.shape[1:]) for x in like)
            for count, copies in reversed(self._rows)
        ]
        dk, dv = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return dk, dv
