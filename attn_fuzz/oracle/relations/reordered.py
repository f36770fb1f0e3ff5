"""The same documents in another order: each has the values that belong to its name, and so the same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from attn_fuzz.cases.subsets import subset
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.reference.case import Case


@dataclasses.dataclass(frozen=True)
class Reordered:
    """A kernel case and the same documents in another order."""

    before: Case
    after: Case
    order: tuple[int, ...]
    """Where in ``before`` each document of ``after`` is."""

    @classmethod
    def of(cls, case: Case, order: Sequence[int]) -> Reordered | None:
        """None where no case can have that order."""
        after = subset(case, order)
        return None if after is None else cls(case, after, tuple(order))

    @classmethod
    def turned(cls, case: Case) -> Reordered | None:
        """The first document last, where there are several, and rows of their own in memory."""
        count = len(case.packed_lengths)
        return cls.of(case, [*range(1, count), 0]) if count > 1 and case.memory != "broadcast" else None

    def back(self, results: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Results of ``after`` with their rows in the order of ``before``; without those that have other rows."""
        device = next(iter(results.values())).device
        first, second = RowIndex(self.before, device), RowIndex(self.after, device)
        places = torch.tensor(self.order).to(device)
        rows = first.begins[places][second.owner] + second.position
        key_rows = first.key_begins[places][second.key_owner] + second.key_position
        places_of = {name: key_rows if name in ("dk", "dv") else rows for name in results}
        return {
            name: torch.empty_like(x).index_copy_(0, places_of[name], x)
            for name, x in results.items()
            if len(x) == len(places_of[name])
        }
