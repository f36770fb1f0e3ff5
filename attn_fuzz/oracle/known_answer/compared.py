"""Results on known-answer inputs beside what they should be, as data: a sentence is made of it elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Final, Protocol

import torch

from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.symptoms import Element, Place, Symptom
from attn_fuzz.reference.answer import Inputs

_FINITE: Final = 1e300
"""Stands for an infinite difference, beside that of NaN, which says more."""

Results = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Compared:
    """Rows of one result, of any number of documents; to make it waits for no device."""

    tensor: str
    document: torch.Tensor
    """int64 ``[rows]``: whose each row is."""
    position: torch.Tensor
    """int64 ``[rows]``: where in its document each row is."""
    got: torch.Tensor
    """``[rows, heads, channels]``, of the LSE without the channels; float64, or the result itself."""
    expected: torch.Tensor
    """As ``got``."""
    beyond: torch.Tensor
    """As ``got``: bool, what is wrong, or float64 in units in which the verdict is at LIMIT."""

    @property
    def wrong(self) -> torch.Tensor:
        """bool, as ``got``."""
        return self.beyond if self.beyond.dtype == torch.bool else self.beyond > LIMIT

    def of_documents(self, count: int) -> torch.Tensor:
        """``[documents]``: whether anything of each is wrong, or the largest deviation of each."""
        rows = self.beyond.flatten(1)
        return largest(rows.any(1) if rows.dtype == torch.bool else rows.amax(1), self.document, count)

    def first(self) -> Wrong | None:
        """The first document, row and head with something wrong, and what is most off there; None where nothing is."""
        by_head = self.wrong if self.wrong.dim() == 2 else self.wrong.any(-1)
        found = by_head.any(1).nonzero()[:, 0]
        if not len(found):
            return None
        # Rows need not lie in the order of documents.
        order = self.document[found] * (1 << 32) + self.position[found]
        row = int(found[order.argmin()])
        head = int(by_head[row].nonzero()[0, 0])
        channel = self._most_off(row, head) if self.got.dim() > 2 else None
        index = (row, head) if channel is None else (row, head, channel)
        place = Place(int(self.document[row]), int(self.position[row]), head, channel)
        return Wrong(Element(place, self.got[index].item(), self.expected[index].item()), index)

    def _most_off(self, row: int, head: int) -> int:
        """The channel, of those that are wrong; NaN before all others."""
        got, expected, wrong = (x[row, head] for x in (self.got, self.expected, self.wrong))
        off = (got.double() - expected.double()).abs().nan_to_num(torch.inf, posinf=_FINITE)
        return int(off.where(wrong, -1.0).argmax())

    def rows(self, some: torch.Tensor) -> Compared:
        """Some of the rows: bool ``[rows]``."""
        tensors = (self.document, self.position, self.got, self.expected, self.beyond)
        return Compared(self.tensor, *(x[some] for x in tensors))

    @classmethod
    def joined(cls, parts: Sequence[Compared]) -> Compared:
        """Rows of the same result, one after another."""
        of_all = zip(*((x.document, x.position, x.got, x.expected, x.beyond) for x in parts), strict=True)
        return cls(parts[0].tensor, *(torch.cat(tensors) for tensors in of_all))


@dataclasses.dataclass(frozen=True)
class Wrong:
    """The wrong element that a sentence is about."""

    element: Element
    index: tuple[int, ...]
    """Row, head, and channel where there are any, in the tensors of ``Compared``."""


def largest(rows: torch.Tensor, owner: torch.Tensor, documents: int) -> torch.Tensor:
    """The largest of each document's rows ``[rows]``, which are not negative; 0 or False of none."""
    numbers = rows.byte() if rows.dtype == torch.bool else rows
    found = numbers.new_zeros(documents).scatter_reduce_(0, owner, numbers, "amax")
    return found.bool() if rows.dtype == torch.bool else found


class KnownAnswer(Protocol):
    """Inputs of a kernel case whose right results are known."""

    symptoms: ClassVar[Mapping[str, type[Symptom]]]
    """The results that are judged, and what one that fails is called."""
    backward: ClassVar[bool]
    """Whether gradients are among them."""

    @property
    def inputs(self) -> Inputs:
        """The tensors of the call."""

    def judge(self, results: Results) -> Iterator[Compared]:
        """What came of them, a result or some of its rows at a time."""
