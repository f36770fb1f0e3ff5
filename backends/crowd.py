"""The loop for calls of thousands of documents that are all of one size: it takes them at once, side by side as heads.

A loop in Python takes half a minute for 65,537 documents; kernels take as long as for any of a few rows.
"""

from __future__ import annotations

from typing import Final

import torch

from attn_fuzz.backends.loop import Call, Document, Loop

CROWD: Final = 4096
"""From so many documents on they are taken at once; the bits of fewer are those of the loop."""


class Crowd(Loop):
    """Documents of one size as one document with as many heads as all of them have."""

    def at_once(self, call: Call) -> int:
        """How many documents are taken as one: all, or 1."""
        m = call.metadata
        count = len(m.lengths_q)
        return count if count >= CROWD and m.gaps == (0, 0) and m.alike else 1

    def documents(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backward: bool
    ) -> list[Document]:
        if (count := self.at_once(call)) == 1:
            return super().documents(call, q, k, v, backward=backward)
        rows, keys = (slice(0, count * lengths[0]) for lengths in (call.metadata.lengths_q, call.metadata.lengths_k))
        return [self.slice(call, 0, rows, keys, (q, k, v), backward=backward)]

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        if (count := self.at_once(call)) == 1:
            return super().read(call, x, rows, name)
        return x[rows].float().unflatten(0, (count, -1)).transpose(1, 2).flatten(0, 1)

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if (count := len(value) // result.shape[1]) > 1:
            value = value.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        super().write(result, rows, value, name)

    def write_lse(self, lse: torch.Tensor, document: Document, value: torch.Tensor) -> None:
        if (count := len(value) // len(lse)) > 1:
            value = value.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        super().write_lse(lse, document, value)

    def saved_lse(self, call: Call, lse: torch.Tensor, document: Document) -> torch.Tensor:
        return self._side_by_side(call, super().saved_lse(call, lse, document))

    def taken(self, call: Call, document: Document, delta: torch.Tensor) -> torch.Tensor:
        if call.dlse is None:
            return delta
        return delta - self._side_by_side(call, call.dlse[:, document.rows])[..., None]

    def _side_by_side(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """``[heads, rows]`` as the documents' are: ``[documents * heads, rows of each]``."""
        count = self.at_once(call)
        return x if count == 1 else x.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)
