"""Where the rows of a packed call lie, and which keys each of them sees: what known-answer inputs are made of."""

from __future__ import annotations

import dataclasses
import functools

import torch

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.packed import packed


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """The documents of a kernel case on a device; nothing here waits for it."""

    case: Case
    device: torch.device

    @functools.cached_property
    def _numbers(self) -> torch.Tensor:
        numbers = (self.case.packed_lengths, self.case.packed_key_lengths, self.case.packed_ids)
        return torch.tensor(numbers, dtype=torch.int64).to(self.device)

    @property
    def lengths(self) -> torch.Tensor:
        """int64 ``[documents]``: queries of each."""
        return self._numbers[0]

    @property
    def key_lengths(self) -> torch.Tensor:
        """int64 ``[documents]``: keys of each."""
        return self._numbers[1]

    @functools.cached_property
    def begins(self) -> torch.Tensor:
        """int64 ``[documents]``: the first row of each."""
        return self.lengths.cumsum(0) - self.lengths

    @functools.cached_property
    def key_begins(self) -> torch.Tensor:
        """int64 ``[documents]``: the first key row of each."""
        return self.key_lengths.cumsum(0) - self.key_lengths

    @property
    def owner(self) -> torch.Tensor:
        """int64 ``[tokens_q]``: the document of each row."""
        return packed(self.case.packed_lengths, self.device).owner

    @property
    def key_owner(self) -> torch.Tensor:
        """int64 ``[tokens_k]``: the document of each key row."""
        return packed(self.case.packed_key_lengths, self.device).owner

    @functools.cached_property
    def position(self) -> torch.Tensor:
        """int64 ``[tokens_q]``: each row's place in its document."""
        return torch.arange(len(self.owner), device=self.device) - self.begins[self.owner]

    @functools.cached_property
    def key_position(self) -> torch.Tensor:
        """int64 ``[tokens_k]``: each key row's place in its document."""
        return torch.arange(len(self.key_owner), device=self.device) - self.key_begins[self.key_owner]

    def seen_by(self, position: torch.Tensor, document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys ``[begin, end)`` of its document that a query at a position there sees."""
        keys = self.key_lengths[document]
        own = position + keys - self.lengths[document]
        left, right = self.case.effective_window
        begin = (own - left).clamp_min(0) if left >= 0 else torch.zeros_like(own)
        end = torch.minimum(own + right + 1, keys) if right >= 0 else keys
        return begin, torch.maximum(begin, end)

    @functools.cached_property
    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys ``[begin, end)`` of its document that each row sees, int64 ``[tokens_q]`` each."""
        return self.seen_by(self.position, self.owner)

    def pick(self, document: torch.Tensor, salt: torch.Tensor | int, count: torch.Tensor | int) -> torch.Tensor:
        """A whole number below ``count`` that depends on the seed, a document's name and a salt."""
        mixed = (self.case.seed * 1_000_003 + self._numbers[2][document] * 8191 + salt * 131) * 0x9E3779B1
        return ((mixed >> 7) & 0xFFFFFF) % count

    def paired(self, x: torch.Tensor, *, keys: bool) -> torch.Tensor:
        """Rows ``[tokens, ...]`` with every second one of a document the opposite of the one before it."""
        lengths, owner, position = (
            (self.key_lengths, self.key_owner, self.key_position) if keys else (self.lengths, self.owner, self.position)
        )
        second = (position % 2 == 1) & (position < lengths[owner] // 2 * 2)
        return torch.where(second.view(-1, *(1,) * (x.dim() - 1)), -x.roll(1, 0), x)
