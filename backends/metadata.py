"""Where documents lie in a varlen call, made of host lengths, without host syncs."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from array import array
from collections.abc import Sequence
from typing import Final, Self

import torch


def prefix_sums(lengths: Sequence[int], device: torch.device, first: int = 0) -> torch.Tensor:
    """int32 ``[len(lengths) + 1]`` starting at ``first``."""
    sums = list(itertools.accumulate(lengths, initial=first))
    return torch.tensor(sums, dtype=torch.int32).to(device, non_blocking=True)


def slots(lengths: Sequence[int], gap: int) -> Sequence[int]:
    """Rows from each document's start to the next one's, where so many behind each are nobody's."""
    return [length + gap for length in lengths] if gap else lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarlenMetadata:
    """Documents of one varlen call. What the host needs is known from lengths; tensors are made when asked for."""

    lengths_q: tuple[int, ...]
    """Queries of each document."""
    lengths_k: tuple[int, ...]
    """Keys of each document."""
    device: torch.device
    first_key_row: int = 0
    """Row of the key tensor where the first document starts; 0 in canonical metadata."""
    gaps: tuple[int, int] = (0, 0)
    """Rows behind each document's queries, and behind its keys, that are nobody's."""
    loose_max_seqlen: tuple[int, int] = (0, 0)
    """By how much ``max_seqlen_q`` and ``max_seqlen_k`` exceed the longest document."""

    def lying_at(self, **tensors: torch.Tensor) -> VarlenMetadata:
        """The same with tensors that lie somewhere already, as parts of one transfer for many calls, by name."""
        made = dataclasses.replace(self)
        vars(made).update(tensors)
        return made

    @functools.cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """int32 ``[documents + 1]``: where each document starts; with gaps the last one's is behind its end."""
        return prefix_sums(slots(self.lengths_q, self.gaps[0]), self.device)

    @functools.cached_property
    def cu_seqlens_k(self) -> torch.Tensor:
        """int32 ``[documents + 1]``; starts at ``first_key_row``."""
        return prefix_sums(slots(self.lengths_k, self.gaps[1]), self.device, self.first_key_row)

    @functools.cached_property
    def seqused_q(self) -> torch.Tensor | None:
        """int32 ``[documents]``: how many rows from its start on are a document's; None where all are."""
        return self._lengths(self.lengths_q) if self.gaps[0] else None

    @functools.cached_property
    def seqused_k(self) -> torch.Tensor | None:
        """The same for keys."""
        return self._lengths(self.lengths_k) if self.gaps[1] else None

    def used(self, side: str) -> torch.Tensor:
        """int32 ``[documents]``: how many rows each document has on the ``q`` or ``k`` side, whether there are gaps or
        none."""
        told, lengths = (self.seqused_q, self.lengths_q) if side == "q" else (self.seqused_k, self.lengths_k)
        return self._lengths(lengths) if told is None else told

    def _lengths(self, lengths: Sequence[int]) -> torch.Tensor:
        return torch.tensor(lengths, dtype=torch.int32).to(self.device, non_blocking=True)

    @functools.cached_property
    def document_index_q(self) -> torch.Tensor:
        """int32 ``[tokens_q]``, counted from 1."""
        return self._index(self.cu_seqlens_q, sum(self.lengths_q))

    @functools.cached_property
    def document_index_k(self) -> torch.Tensor:
        """int32 ``[first_key_row + tokens_k]``, counted from 1; 0 stands before the first document."""
        return self._index(self.cu_seqlens_k, self.first_key_row + sum(self.lengths_k))

    def _index(self, cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
        rows = torch.arange(tokens, dtype=torch.int32, device=self.device)
        return torch.searchsorted(cu_seqlens, rows, right=True, out_int32=True)

    @functools.cached_property
    def max_seqlen_q(self) -> int:
        return max(self.lengths_q) + self.loose_max_seqlen[0]

    @functools.cached_property
    def max_seqlen_k(self) -> int:
        return max(self.lengths_k) + self.loose_max_seqlen[1]

    @property
    def min_seqlen_q(self) -> int:
        return min(self.lengths_q)

    @property
    def min_seqlen_k(self) -> int:
        return min(self.lengths_k)

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all documents are of one size; found out once, for it is asked of every tensor of every document."""
        return len(set(self.lengths_q)) == len(set(self.lengths_k)) == 1

    @property
    def straddling(self) -> bool:
        """Whether some document has other numbers of queries and keys, so that causal alignment matters."""
        return self.lengths_q != self.lengths_k

    def rows_from_end(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How far each query and each key stands from the end of its own document, ``[tokens_q]`` and ``[tokens_k]``.

        Rows counted so are aligned by definition of bottom-right.
        """
        index_q, index_k = self.document_index_q.long(), self.document_index_k.long()
        from_end_q = self.cu_seqlens_q[index_q] - torch.arange(len(index_q), device=self.device)
        from_end_k = self.cu_seqlens_k[index_k] - torch.arange(len(index_k), device=self.device)
        return from_end_q, from_end_k

    def allowed(self, window: tuple[int, int]) -> torch.Tensor:
        """The explicit bottom-right mask, bool ``[tokens_q, tokens_k]``, True where a query sees a key.

        Args:
            window: (left, right) with causality folded in, -1 for no bound.
        """
        left, right = window
        document, begin, place, keys = self._among_keys
        # A query that sees none behind it sees none of another document there.
        mask = (keys >= begin).logical_and_(keys < self.cu_seqlens_k[document] if right else keys <= place)
        if right > 0:
            mask &= keys - place <= right
        if left >= 0:
            mask &= place - keys <= left
        return mask

    @functools.cached_property
    def _among_keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 ``[tokens_q, 1]``: each query's document, counted from 1, where its keys begin, and where the query
        stands among them, counted from the end of both; and the row of each key ``[tokens_k]``."""
        document, rows = self.document_index_q, (sum(self.lengths_q), self.first_key_row + sum(self.lengths_k))
        queries, keys = (torch.arange(count, dtype=torch.int32, device=self.device) for count in rows)
        place = (self.cu_seqlens_k - self.cu_seqlens_q)[document].add_(queries)
        return document[:, None], self.cu_seqlens_k[document - 1][:, None], place[:, None], keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroSequenceMetadata:
    """What the layer knows of one micro-sequence: the varlen call over its active extent, and positions."""

    begin: int
    end: int
    first_document_begin: int
    """Where the first active document starts in the packed sequence; rows before it are dead."""
    varlen: VarlenMetadata
    """Canonical: prefix sums start at 0 and describe K/V rows ``[first_document_begin, end)``."""

    @property
    def past_length(self) -> int:
        """K/V rows already in the buffer."""
        return self.begin

    @functools.cached_property
    def position_index(self) -> torch.Tensor:
        """int32 ``[end - begin]``: position of every query token within its document."""
        return _transferred([self._positions()], self.varlen.device)[0]

    def _positions(self) -> array[int]:
        lengths, rows = self.varlen.lengths_k, array("i")
        counted = _counted(max(lengths).bit_length())
        for length in lengths:
            rows += counted[:length]
        return rows[self.past_length - self.first_document_begin :]

    def transferred(self) -> Self:
        """The same, with prefix sums and positions on the device already, as parts of one transfer."""
        varlen = self.varlen
        sums = (array("i", itertools.accumulate(each, initial=0)) for each in (varlen.lengths_q, varlen.lengths_k))
        parts = _transferred([*sums, self._positions()], varlen.device)
        # Where they would be kept when they are asked for.
        vars(varlen)["cu_seqlens_q"], vars(varlen)["cu_seqlens_k"], vars(self)["position_index"] = parts
        return self


@functools.lru_cache(maxsize=32)
def _counted(bits: int) -> array[int]:
    """Numbers of so many bits from 0 on, not to be written to: documents copy theirs, which takes no step per token."""
    return array("i", range(1 << bits))


_STEP: Final = 32
"""Parts of a transfer begin at multiples of so many numbers: 128 bytes."""


def _transferred(parts: Sequence[array[int]], device: torch.device) -> list[torch.Tensor]:
    """Numbers as int32 tensors that lie in one allocation; a transfer costs as much as several launches."""
    together, places = array("i"), list[slice]()
    for part in parts:
        places.append(slice(len(together), len(together) + len(part)))
        together.extend(part)
        together.extend((-1,) * (-len(together) % _STEP))
    # Never empty, which has no buffer.
    together.append(-1)
    lying = torch.frombuffer(together, dtype=torch.int32).to(device, non_blocking=True)
    return [lying[place] for place in places]


@functools.lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Where each document begins, and where the last one ends."""
    return tuple(itertools.accumulate(lengths, initial=0))


def preprocess(
    lengths: Sequence[int], begin: int, end: int, *, causal: bool, device: torch.device
) -> MicroSequenceMetadata:
    """Metadata of the micro-sequence ``[begin, end)`` of a packed sequence.

    Args:
        lengths: of all documents of the packed sequence; padding counts as a last document.
        begin: first token of the micro-sequence, which is also the past length.
        end: one past its last token.
        causal: whether queries only look back.
        device: where tensors are made.

    Raises:
        ValueError: when the window is no part of the sequence, or non-causal attention would need keys behind it.
    """
    bounds = _bounds(tuple(lengths))
    total = bounds[-1]
    if not 0 <= begin < end <= total:
        raise ValueError(f"micro-sequence [{begin}, {end}) is no part of a sequence of {total} tokens")
    # From the document that holds the first token, or an empty one that stands before it. Empty documents belong where
    # they stand; those at the very end close the last micro-sequence.
    first = min(bisect.bisect_right(bounds, begin) - 1, bisect.bisect_left(bounds, begin))
    last = len(lengths) if end == total else bisect.bisect_left(bounds, end)
    if not causal and bounds[last] > end:
        raise ValueError(
            f"non-causal attention needs whole documents, but [{begin}, {end}) cuts one that ends at {bounds[last]}"
        )
    # What the micro-sequence cuts is the first document's beginning and the last one's end.
    lengths_k = [*lengths[first:last]]
    lengths_k[-1] -= max(bounds[last] - end, 0)
    lengths_q = [*lengths_k]
    lengths_q[0] -= max(begin - bounds[first], 0)
    return MicroSequenceMetadata(
        begin=begin,
        end=end,
        first_document_begin=bounds[first],
        varlen=VarlenMetadata(lengths_q=tuple(lengths_q), lengths_k=tuple(lengths_k), device=device),
    )
