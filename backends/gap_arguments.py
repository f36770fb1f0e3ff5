"""How a kernel from outside is told of rows between documents: by ``seqused``, or by prefix sums of padded lengths."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends.metadata import VarlenMetadata, prefix_sums

_USED: Final = {"seqused_q": "q", "seqused_k": "k"}
"""int32 ``[documents]``: how many rows from its start on are a document's; ``cu_seqlens`` are the starts."""

_PADDED: Final = {"cu_seqlens_q_padded": "q", "cu_seqlens_k_padded": "k", "cu_seqlens_kv_padded": "k"}
"""int32 ``[documents + 1]``: where documents start; ``cu_seqlens`` are prefix sums of their lengths."""


@dataclasses.dataclass(frozen=True)
class GapArguments:
    """Which of these arguments a kernel has, by name, and the side that each is about."""

    used: Mapping[str, str]
    padded: Mapping[str, str]
    always: frozenset[str]
    """Those that every call has to give it."""

    @classmethod
    def of(cls, function: Callable[..., Any], declared: Sequence[str] = ()) -> GapArguments:
        """Those of a function; what takes anything (``**options``) is given ``seqused`` on sides that it declares."""
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            parameters = {}  # type: ignore[assignment]
        named = {
            name: each
            for name, each in parameters.items()
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        }
        anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        used = {name: side for name, side in _USED.items() if name in named or (anything and side in declared)}
        padded = {name: side for name, side in _PADDED.items() if name in named and side not in used.values()}
        always = frozenset(
            name for name in (*used, *padded) if name in named and named[name].default is inspect.Parameter.empty
        )
        return cls(used, padded, always)

    @property
    def sides(self) -> tuple[str, ...]:
        """Sides on which there may be gaps."""
        return tuple(side for side in ("q", "k") if side in (*self.used.values(), *self.padded.values()))

    def sums(self, metadata: VarlenMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """(cu_seqlens_q, cu_seqlens_k) as the kernel understands them."""
        starts = {"q": metadata.cu_seqlens_q, "k": metadata.cu_seqlens_k}
        lengths = {"q": metadata.lengths_q, "k": metadata.lengths_k}
        for side, gap in zip("qk", metadata.gaps, strict=True):
            if gap and side in self.padded.values():
                starts[side] = prefix_sums(lengths[side], metadata.device)
        return starts["q"], starts["k"]

    def given(self, metadata: VarlenMetadata) -> dict[str, torch.Tensor]:
        """What a call is told beside them: nothing of a side without gaps, unless it must be."""
        gapped = {side for side, gap in zip("qk", metadata.gaps, strict=True) if gap}
        told = {name: metadata.used(side) for name, side in self.used.items() if side in gapped or name in self.always}
        for name, side in self.padded.items():
            if side in gapped or name in self.always:
                told[name] = metadata.cu_seqlens_q if side == "q" else metadata.cu_seqlens_k
        return told
