"""Which keys a query sees: causal alignment, windows, documents."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.loop import Call, Document


class TopLeft(KernelFault):
    """Causal is aligned top-left."""

    id = "M18"
    reports = ("Fast-LLM#512", "pytorch#108108", "SageAttention#372", "onnxruntime#29020")

    def shift(self, call: Call, document: Document) -> int:
        return 0


class TopLeftBackward(KernelFault):
    """Causal is aligned bottom-right in the forward and top-left in the backward."""

    id = "M19"
    reports = ("ffpa-attn#300",)

    def shift(self, call: Call, document: Document) -> int:
        return 0 if document.backward else super().shift(call, document)


class CausalDroppedBackward(KernelFault):
    """The backward ignores causality."""

    id = "M20-causal"
    reports = ("triton#4541", "Dao-AILab/flash-attention#2424")

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        left, right = call.options.effective_window
        return self.window_mask(call, document, left, -1 if document.backward else right)


class WindowDroppedBackward(KernelFault):
    """The backward ignores the window."""

    id = "M20-window"
    reports = ("MSLK#263",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        left, right = call.options.effective_window
        return self.window_mask(call, document, -1 if document.backward else left, right)


class WindowLeft(KernelFault):
    """A window sees one key too many on the left."""

    id = "M21-left"
    reports = ("transformers#39408", "#29623", "zml#763")

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        left, right = call.options.effective_window
        return self.window_mask(call, document, left + (left >= 0), right)


class WindowRight(KernelFault):
    """A window sees one key too few on the right."""

    id = "M21-right"
    reports = ("TransformerEngine#1197",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        left, right = call.options.effective_window
        return self.window_mask(call, document, left, max(right - 1, 0) if right >= 0 else right)


class WideWindow(KernelFault):
    """A window as wide as the longest document is switched off, and causality with it."""

    id = "M22"
    reports = ("libflash_attn#11",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        left, right = call.options.effective_window
        wide = left >= call.metadata.max_seqlen_k
        return self.window_mask(call, document, -1 if wide else left, -1 if wide else right)


class WindowPerTile(KernelFault):
    """The window's left side is taken from the first row of a tile of 4, for all of its rows."""

    id = "M23"
    reports = ("executorch#21857", "nanochat#456")

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        left, right = call.options.effective_window
        seen = self.window_mask(call, document, left, right)
        if left >= 0:
            first = torch.arange(document.queries) // 4 * 4
            seen = self.window_mask(call, document, left, -1)[first] & self.window_mask(call, document, -1, right)
        return seen


class WindowByPackedRow(KernelFault):
    """With grouped heads the window counts (head, row) pairs packed into one index."""

    id = "C10"
    reports = ("vllm#17476",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        left, right = call.options.effective_window
        seen = self.window_mask(call, document, left, right).expand(len(document.q), -1, -1)
        if left >= 0 and call.group > 1 and document.queries > 1:
            seen = seen.clone()
            seen[1 :: call.group] &= self.window_mask(call, document, max(left - 1, 0), right)
        return seen


class OneDocument(KernelFault):
    """Document boundaries are ignored: all queries see all keys before them."""

    id = "M25-all"
    reports = ("Megatron-LM#2357", "transformers#46634", "AReaL#1442", "maxtext#4476")

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        found = super().bounds(call, side, backward=backward)
        return [(found[0][0], found[-1][1])]


class FirstBoundaryOnly(KernelFault):
    """Only the first boundary is honoured; all later documents are one."""

    id = "M25-first"
    reports = ("HunyuanVideo#310",)

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        found = super().bounds(call, side, backward=backward)
        return [found[0], (found[1][0], found[-1][1])] if len(found) > 1 else found


class LeaksOneKey(KernelFault):
    """A document's first row sees the last key of the document before it."""

    id = "M25-one"
    reports = ("xformers#1122",)

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        value = super().weighted(call, document, probabilities, v)
        begin = document.keys.start
        if begin and document.queries and document.seen:
            before = self.expand(call, self.read(call, v, slice(begin - 1, begin), "v"), False)
            value[:, :1] = value[:, :1] * 0.875 + 0.125 * before
        return value


class RoundedCausalLimit(KernelFault):
    """The backward's causal limit is rounded down to a chunk of 8 keys for rows beyond the first chunk."""

    id = "G5"
    reports = ("Dao-AILab/flash-attention#1915",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        seen = super().mask(call, document)
        if document.backward and call.options.effective_window[1] == 0:
            limit = torch.arange(document.queries) + self.shift(call, document)
            key = torch.arange(document.seen)
            # Rows that end a chunk lose its last key.
            seen = seen & ~((limit[:, None] % 8 == 7) & (key == limit[:, None]))
        return seen


class MaskIndexWraps(KernelFault):
    """The offset row * keys into the mask is kept in 10 bits."""

    id = "F1"
    reports = ("pytorch#187227", "#162588")

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        seen = super().mask(call, document)
        if document.seen:
            row = torch.arange(document.queries) * document.seen % 1024 // document.seen
            seen = seen[row]
        return seen


class FirstLengthForAll(KernelFault):
    """Every document is given the key length of the first, where it has that many."""

    id = "J6"
    reports = ("nanochat#485", "flash-attention#1795")

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        seen = super().mask(call, document)
        first = call.metadata.lengths_k[0]
        if 0 < first < document.seen:
            seen = seen & (torch.arange(document.seen) < first)
        return seen


class OneKeyInLongDocuments(KernelFault):
    """In documents of more than 24 keys one query row misses one key, forward only."""

    id = "X03"

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        seen = super().mask(call, document)
        if not document.backward and document.seen > 24 and document.queries:
            seen[-1, document.seen // 2] = False
        return seen


class OneKeyBackward(KernelFault):
    """In documents of more than 24 keys one query row misses one key, backward only."""

    id = "X04"

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        seen = super().mask(call, document)
        if document.backward and document.seen > 24 and document.queries:
            seen[-1, document.seen // 2] = False
        return seen


class MaxSeqlenFromQueries(KernelFault):
    """Keys beyond the longest document's number of queries are never visited."""

    id = "X05"
    reports = ("transformers#39814",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        return super().mask(call, document) & (torch.arange(document.seen) < call.metadata.max_seqlen_q)


class EmptyShiftsKeys(KernelFault):
    """Documents without queries are skipped on the query side only: later ones get their neighbour's keys."""

    id = "M12"
    reports = ("xformers (batch of one)",)

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        found = super().bounds(call, side, backward=backward)
        return [(begin, end) for begin, end in found if end > begin] if side == "q" else found


class StaleMetadata(KernelFault):
    """Prefix sums are kept from the first call with as many documents and tokens."""

    id = "M43"
    reports = ("Dao-AILab/flash-attention#1192", "lmdeploy#4569", "SageAttention#392")

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        found = super().bounds(call, side, backward=backward)
        return self._kept.setdefault((len(found), found[-1][1]), found) if side == "k" else found


class StaleScale(KernelFault):
    """A plan made for the first call of a shape keeps its scale."""

    id = "M35-scale"
    reports = ("flashinfer#4270", "#4014", "TransformerEngine#3289")

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], float] = {}

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        metadata = call.metadata
        key = (sum(metadata.lengths_q), sum(metadata.lengths_k), *document.q.shape[::2], len(metadata.lengths_q))
        scale = self._plans.setdefault(key, call.options.scale)
        return super().scores(
            dataclasses.replace(call, options=dataclasses.replace(call.options, scale=scale)), document
        )


class StaleWindow(KernelFault):
    """A plan made for the first call of a shape keeps its window."""

    id = "M35-window"
    reports = ("flashinfer#4146", "cudnn-frontend#517")

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], tuple[int, int]] = {}

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        metadata = call.metadata
        key = (sum(metadata.lengths_q), sum(metadata.lengths_k), *document.q.shape[::2], len(metadata.lengths_q))
        return self.window_mask(call, document, *self._plans.setdefault(key, call.options.effective_window))
