"""Where a layer's results are kept from what it does later: as copies of their own, or in their places in a batch's.

A result is copied when it is handed back, since nothing that comes later may change what it was. In a batch that is the
only copy: it goes to where all calls' results of that name lie one behind another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch


class Kept:
    """Copies in memory of their own."""

    def part(self, name: str, begin: int, end: int, x: torch.Tensor) -> torch.Tensor:
        """A copy of what was handed back for the tokens ``[begin, end)``."""
        return x.detach().clone()

    def joined(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """All parts of a result, in the order of their tokens."""
        return torch.cat(list(parts))

    def whole(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of results that are there as a whole."""
        return {name: x.detach().clone() for name, x in found.items()}


class Arenas:
    """Memory for all calls' results, by name; each is made when the first call gives it, in that one's dtype.

    Args:
        counts: tokens of each call.
        rows: shape of a token's row, by name of those results that have one for each token.
        shapes: of the other results, one for each call.
        device: where.
    """

    def __init__(
        self,
        counts: Sequence[int],
        rows: Mapping[str, Sequence[int]],
        shapes: Mapping[str, Sequence[int]],
        device: torch.device,
    ) -> None:
        self.rows, self.shapes, self.device = rows, shapes, device
        self._bounds = list(itertools.accumulate(counts, initial=0))
        self._made: dict[str, torch.Tensor] = {}

    def of_call(self, index: int) -> KeptInPlace:
        """Those of one call."""
        return KeptInPlace(self, index)

    def place(
        self, name: str, index: int, like: torch.Tensor, span: tuple[int, int] | None = None
    ) -> torch.Tensor | None:
        """A result's place in a call, or that of the tokens ``span``; None for what is no result, or does not fit.

        Args:
            name: of the result.
            index: which call.
            like: what is to be put there.
            span: ``[begin, end)`` among the call's tokens; None for all of it.
        """
        row = self.rows.get(name, self.shapes.get(name))
        if row is None or like.device != self.device:
            return None
        if name in self.rows:
            begin, end = span or (0, self._bounds[index + 1] - self._bounds[index])
            shape: tuple[int, ...] = (end - begin, *row)
        else:
            begin, shape = 0, tuple(row)
        if like.shape != shape:
            return None
        made = self._made.get(name)
        if made is None:
            count = self._bounds[-1] if name in self.rows else len(self._bounds) - 1
            made = self._made[name] = torch.zeros(count, *row, dtype=like.dtype, device=self.device)
        if made.dtype != like.dtype:
            return None
        return made.narrow(0, self._bounds[index] + begin, shape[0]) if name in self.rows else made[index]

    def rows_of(self, name: str, index: int) -> torch.Tensor | None:
        """A call's rows of a result that has one for each token, once any call has given it."""
        made = self._made.get(name)
        return None if made is None else made[self._bounds[index] : self._bounds[index + 1]]

    def result(self, name: str, of_calls: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """All calls' results of a name, where those of all that have one lie here; the others are 0.

        Args:
            name: of the result.
            of_calls: each call's own, None for one that has none.
        """
        made = self._made.get(name)
        if made is None or any(x is not None and not lies_in(x, made) for x in of_calls):
            return None
        for index, x in enumerate(of_calls):
            if x is None:
                own = self._bounds[index : index + 2] if name in self.rows else (index, index + 1)
                made[slice(*own)].zero_()
        return made


def lies_in(x: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a tensor is a part of the memory of another."""
    return x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


class KeptInPlace(Kept):
    """A call's results in their places among all calls'; what does not fit there is kept as it is, to be judged.

    Args:
        arenas: of all calls.
        index: which call.
    """

    def __init__(self, arenas: Arenas, index: int) -> None:
        self._arenas, self._index = arenas, index

    def part(self, name: str, begin: int, end: int, x: torch.Tensor) -> torch.Tensor:
        place = self._arenas.place(name, self._index, x, (begin, end))
        return super().part(name, begin, end, x) if place is None else place.copy_(x.detach())

    def joined(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = self._arenas.rows_of(name, self._index)
        if whole is None or sum(map(len, parts)) != len(whole) or not all(lies_in(part, whole) for part in parts):
            return super().joined(name, parts)
        return whole

    def whole(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        places = {name: self._arenas.place(name, self._index, x) for name, x in found.items()}
        kept = {name: place for name, place in places.items() if place is not None}
        alike: dict[torch.dtype, list[str]] = {}
        for name in kept:
            alike.setdefault(found[name].dtype, []).append(name)
        for names in alike.values():
            # One launch for all of a dtype.
            torch._foreach_copy_([kept[name] for name in names], [found[name].detach() for name in names])
        return {name: kept[name] if name in kept else found[name].detach().clone() for name in found}
