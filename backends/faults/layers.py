"""The buffered layer: metadata, positions, gradients across micro-sequences."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import LayerFault
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.layer import BufferedLayer, BufferRegion
from attn_fuzz.backends.legacy import LegacyLayer
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.reference.case import Case


class PrefixUnwritten(LayerFault, LegacyLayer):
    """cu_seqlens_k starts at first_document_begin: gradient rows before it are never written."""

    id = "M01"
    reports = ("Fast-LLM#514",)


class MetadataByLength(LayerFault, BufferedLayer):
    """Metadata is kept from the first micro-sequence of a length."""

    id = "M43-layer"
    reports = ("SageAttention#392", "rotary-embedding-torch#11")

    def preprocess(self, begin: int, end: int) -> MicroSequenceMetadata:
        made = super().preprocess(begin, end)
        kept = self.__dict__.setdefault("_kept", {}).setdefault(end - begin, made)
        if sum(kept.varlen.lengths_k) != sum(made.varlen.lengths_k):
            return made
        return dataclasses.replace(made, varlen=kept.varlen)


class GlobalPositions(LayerFault, BufferedLayer):
    """Rotary positions count through the micro-sequence: neither documents nor cuts matter to them."""

    id = "M50-chunk"
    reports = ("OLMo-core#591", "torchtitan#2559", "Seq1F1B#6")

    def query_key_value(self, x: torch.Tensor, position_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().query_key_value(
            x, torch.arange(len(x), dtype=position_index.dtype, device=x.device) % max(self.lengths)
        )


class KeyPositionsLate(LayerFault, BufferedLayer):
    """Keys are rotated by one position more than queries."""

    id = "M50-key"
    reports = ("Megatron-LM#453",)

    def query_key_value(self, x: torch.Tensor, position_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, _, v = super().query_key_value(x, position_index)
        late = torch.clamp(position_index + 1, max=max(self.lengths) - 1)
        _, k, _ = super().query_key_value(x, late)
        return q, k, v


class PastForgotten(LayerFault, BufferedLayer):
    """A straddling document's queries see only the keys of their own micro-sequence."""

    id = "X22"
    reports = ("nanochat#456",)

    def preprocess(self, begin: int, end: int) -> MicroSequenceMetadata:
        made = super().preprocess(begin, end)
        if made.first_document_begin == begin:
            return made
        first = made.varlen.lengths_q[0]
        varlen = dataclasses.replace(made.varlen, lengths_k=(first, *made.varlen.lengths_k[1:]))
        return dataclasses.replace(made, first_document_begin=begin, varlen=varlen)


class ExtentOneEarly(LayerFault, BufferedLayer):
    """first_document_begin is one row too early where there is one: keys are a row off."""

    id = "X23"
    reports = ("Fast-LLM#514",)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: MicroSequenceMetadata
    ) -> torch.Tensor:
        early = max(0, metadata.first_document_begin - 1)
        return super().attend(q, k, v, dataclasses.replace(metadata, first_document_begin=early))


class PaddingJoins(LayerFault, BufferedLayer):
    """Padding is taken to be part of the last document, and the last document's keys are seen from it."""

    id = "X24"
    reports = ("TransformerEngine#2186", "Megatron-LM#5298")

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        if case.padding and case.causal:
            self.lengths = (*case.lengths[:-1], case.lengths[-1] + case.padding)
            self.rotary = type(self.rotary)(case, max(self.lengths), self.device)


class _QueryOffset(BufferRegion):
    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buffer, metadata = ctx.buffer, ctx.extent  # type: ignore[attr-defined]
        dq, dk, dv = torch.autograd.grad(ctx.out, ctx.leaves, dout)  # type: ignore[attr-defined]
        begin = min(metadata.begin, len(buffer.dk) - len(dk))
        buffer.accumulate(begin, begin + len(dk), dk, dv)
        return (dq, *buffer.gradients(metadata.begin, metadata.end), None, None)


class GradientAtQueryOffset(LayerFault, BufferedLayer):
    """dK and dV are added at the queries' offset instead of the keys'."""

    id = "H4"
    reports = ("pytorch#152625", "fla#1115")

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: MicroSequenceMetadata
    ) -> torch.Tensor:
        return _QueryOffset.apply(q, k, v, self, metadata)


class _TakesEarly(BufferRegion):
    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buffer, metadata = ctx.buffer, ctx.extent  # type: ignore[attr-defined]
        dq, dk, dv = torch.autograd.grad(ctx.out, ctx.leaves, dout)  # type: ignore[attr-defined]
        own = len(dk) - (metadata.end - metadata.begin)
        buffer.accumulate(metadata.first_document_begin, metadata.end, dk, dv)
        return (dq, dk[own:].to(buffer.k.dtype), dv[own:].to(buffer.v.dtype), None, None)


class FutureGradientLost(LayerFault, BufferedLayer):
    """Keys get the gradient of their own micro-sequence only; later ones stay in the buffer."""

    id = "H1"
    reports = ("diffusers#14265", "pytorch#152625")

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: MicroSequenceMetadata
    ) -> torch.Tensor:
        return _TakesEarly.apply(q, k, v, self, metadata)


class WeightGradientOverwritten(LayerFault, BufferedLayer):
    """The output projection's gradient is that of the last micro-sequence taken back."""

    id = "H8"
    reports = ("Fast-LLM#551",)

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        self.gradients["dense"].zero_()
        return super().backward(dout)


class LossScaled(LayerFault, BufferedLayer):
    """Gradients are divided by the number of micro-sequences."""

    id = "H9"
    reports = ("Megatron-LM#673", "SkyRL#1420")

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        return super().backward(dout / (len(self.case.cuts) + 1))


class NormGradientLost(LayerFault, BufferedLayer):
    """The key norm's weight gets no gradient from micro-sequences after the first."""

    id = "X25"

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name != "key_norm" or name not in self.norms or not self.buffer.frontier:
            return super().norm(x, name)
        kept = self.norms[name]
        self.norms[name] = kept.detach()
        try:
            return super().norm(x, name)
        finally:
            self.norms[name] = kept


class ValueRotated(LayerFault, BufferedLayer):
    """Where keys and values share a projection, values are rotated with the keys."""

    id = "X26"

    def query_key_value(self, x: torch.Tensor, position_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = super().query_key_value(x, position_index)
        return q, k, self.rotary(v, position_index) if self.case.shared_key_value else v


class MetadataShared(LayerFault, BufferedLayer):
    """Documents' lengths are those of the sequence before, where that had as many tokens and documents."""

    id = "M26"
    reports = ("fla#842", "axolotl#1375")
    _before: ClassVar[tuple[int, ...]] = ()

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        lengths = case.packed_lengths
        if case.causal:
            same = (sum(self._before), len(self._before)) == (sum(lengths), len(lengths))
            self.lengths = self._before if same else lengths
            MetadataShared._before = lengths
            # Rotary tables are as long as the longest document.
            self.rotary = type(self.rotary)(case, max(*self.lengths, *lengths), self.device)
