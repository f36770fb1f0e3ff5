"""Isolation: what a result must not depend on is filled with garbage, and the result stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import torch

from attn_fuzz.execution.inferred import InferredCapabilities
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.known_answer.compared import Compared
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs

_OF_DOCUMENTS: Final = {
    "kernel": ("out", "lse", "dq", "dk", "dv"),
    "layer": ("out", "dx", "k", "v", "dk", "dv"),
}


def garbage_of(case: Case, inferred: InferredCapabilities, finite: float) -> float:
    """NaN or infinity where the backend keeps them apart, the finite number otherwise; by the case's seed."""
    return (finite, torch.nan, torch.inf)[case.seed % 3] if inferred.isolates_nonfinite else finite


def first_kept(case: Case) -> int:
    """The document from which on every other one keeps its values: the first or the second, by the case's seed."""
    return case.seed // 3 % 2


def kept_documents(case: Case) -> list[int]:
    """Every other document."""
    return list(range(first_kept(case), len(case.packed_lengths), 2))


def moved_bits(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Elements that are no longer the same: 0 times a negative number is -0, so that signs of zeros may move."""
    return (before != after) & ~(before.isnan() & after.isnan())


def far_apart(before: torch.Tensor, after: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Elements further apart than two runs are whose roundings of their own have that variance."""
    near = (before.double() - after.double()).abs() <= 2**0.5 * LIMIT * variance.sqrt()
    return ~near & (before != after)


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """Garbage everywhere but in some rows, whose results must not change."""

    places: RowIndex
    rows: torch.Tensor
    """bool ``[tokens_q]``: rows that keep their values."""
    key_rows: torch.Tensor
    """bool ``[tokens_k]``: key rows that do."""
    garbage: float
    results: tuple[str, ...]
    """Those of which such rows must not change."""

    @classmethod
    def documents(cls, case: Case, device: torch.device, garbage: float) -> Spoiled:
        """Every other document is garbage."""
        places, turn = RowIndex(case, device), first_kept(case)
        rows = places.owner % 2 == turn
        key_rows = places.key_owner % 2 == turn if case.level == "kernel" else rows
        return cls(places, rows, key_rows, garbage, _OF_DOCUMENTS[case.level])

    @classmethod
    def future(cls, case: Case, device: torch.device, garbage: float) -> Spoiled | None:
        """The later half of each document's queries, and the keys that the earlier half does not see.

        Args:
            case: a kernel case.
            device: where.
            garbage: finite: kernels multiply whole tiles, so that masked NaN in a row's own tile may stay NaN.

        Returns:
            None where every row sees every key.
        """
        if max(case.effective_window) < 0:
            return None
        places = RowIndex(case, device)
        rest = places.lengths // 2
        every = torch.arange(len(rest), device=device)
        # What rows in a row see is a run of keys, too.
        begin, end = places.seen_by(torch.zeros_like(rest), every)[0], places.seen_by(rest - 1, every)[1]
        end, owner = torch.where(rest > 0, end, begin), places.key_owner
        seen = (places.key_position >= begin[owner]) & (places.key_position < end[owner])
        return cls(places, places.position < rest[places.owner], seen, garbage, ("out", "lse", "dq"))

    def _kept(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a result's rows: which have to stay, the document and the place in it of each."""
        places = self.places
        if places.case.level == "kernel" and name in ("dk", "dv"):
            return self.key_rows, places.key_owner, places.key_position
        return self.rows, places.owner, places.position

    def fits(self, name: str, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
        """Whether both runs gave the result, a row for each of its tokens."""
        first, second = before.get(name), after.get(name)
        rows = len(self._kept(name)[0])
        return first is not None and second is not None and first.shape == second.shape and len(first) == rows

    def inputs(self, drawn: Inputs) -> Inputs:
        """The drawn tensors of a kernel case with the garbage in them."""
        # One gradient for all rows cannot be spoilt in some.
        broadcast = self.places.case.memory == "broadcast"
        return Inputs(
            self._fill(drawn.q, self.rows),
            self._fill(drawn.k, self.key_rows),
            self._fill(drawn.v, self.key_rows),
            drawn.dout if broadcast else self._fill(drawn.dout, self.rows),
            None if drawn.dlse is None else self._fill(drawn.dlse, self.rows),
        )

    def layer_inputs(self, drawn: LayerInputs) -> LayerInputs:
        """The drawn tensors of a layer case with the garbage in them."""
        return dataclasses.replace(drawn, x=self._fill(drawn.x, self.rows), dout=self._fill(drawn.dout, self.rows))

    def _fill(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return torch.where(kept.view(-1, *(1,) * (x.dim() - 1)), x, x.new_tensor(self.garbage))

    def compared(self, name: str, before: torch.Tensor, after: torch.Tensor, moved: torch.Tensor) -> Compared:
        """A result's rows, of which those that have to stay are wrong where they moved.

        Args:
            name: of the result.
            before: of the drawn values, ``[rows, ...]``.
            after: of the spoiled ones.
            moved: bool, as both: elements that are not the same.
        """
        kept, document, position = self._kept(name)
        return Compared(name, document, position, after, before, moved & kept.view(-1, *(1,) * (moved.dim() - 1)))
