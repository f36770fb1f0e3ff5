"""Channels and heads that few tests have: values of another head_dim than keys, odd head dimensions, large groups."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.faults.sizes import GroupBeyondTile
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call, Document, Gradients

_WIDEST = 256
_VECTOR = 16
_WIDE = 128
_HEADS = 64
_FOUR_BITS = 16
_ROWS = 2048


class ValuesFault(KernelFault):
    """Common to faults of values that have another head_dim than keys."""

    capabilities: ClassVar[Capabilities] = Capabilities(covers_all_rows=False, head_dims_v=True)
    levels: ClassVar[tuple[str, ...]] = ("kernel",)


class ValuesCutOff(ValuesFault):
    """The output is written in as many channels as keys have: values' further ones come out as zeros."""

    id = "D01"
    reports = ("the class of flashinfer#3563",)

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = super().weighted(call, document, probabilities, v)
        out[..., document.q.shape[-1] :] = 0
        return out


class ValueHeadsByKeys(ValuesFault):
    """Heads of V are taken to lie as far apart as a key has channels."""

    id = "D02"

    def slice(
        self, call: Call, index: int, rows: slice, keys: slice, qkv: tuple[torch.Tensor, ...], *, backward: bool
    ) -> Document:
        q, k, v = qkv
        heads, channels = v.shape[1:]
        # What lies beyond a row's end is taken from its beginning: nothing is read from outside.
        step = torch.arange(heads, device=v.device)[:, None] * k.shape[-1]
        place = (step + torch.arange(channels, device=v.device)) % (heads * channels)
        return super().slice(call, index, rows, keys, (q, k, v.flatten(1)[:, place]), backward=backward)


class DeltaOverKeyChannels(ValuesFault):
    """rowsum(dO O) runs over as many channels as keys have, although the output has more."""

    id = "D03"

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        channels = document.q.shape[-1]
        return super().delta(call, document, out[..., :channels], dout[..., :channels])


class ScaleOfValues(ValuesFault):
    """The usual softmax scale is taken from the channels of values, and not of keys."""

    id = "D04"

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        return super().scores(_with_scale_of_values(call, document), document)


def _with_scale_of_values(call: Call, document: Document) -> Call:
    if abs(call.options.scale * document.k.shape[-1] ** 0.5 - 1) > 1e-6:
        return call
    scale = document.v.shape[-1] ** -0.5
    return dataclasses.replace(call, options=dataclasses.replace(call.options, scale=scale))


class WideHeadsTruncated(KernelFault):
    """Scores are products of the first 256 channels, however many there are."""

    id = "D05"
    reports = ("the class of flash-attention#2881",)

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        narrow = dataclasses.replace(document, q=document.q[..., :_WIDEST], k=document.k[..., :_WIDEST])
        return super().scores(call, narrow)


class HalfVectorLost(KernelFault):
    """Beyond 128 channels dK is written in vectors of 16: the last 8 of a head_dim between two of them are 0."""

    id = "D06"
    reports = ("the class of flash-attention#2698",)

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        channels = value.shape[-1]
        if name == "dk" and channels > _WIDE and channels % _VECTOR:
            value = value.clone()
            value[..., channels // _VECTOR * _VECTOR :] = 0
        super().write(result, rows, value, name)


class GroupInFourBits(GroupBeyondTile):
    """A query head's place in its group is kept in 4 bits: the 17th is given the probabilities of the first."""

    id, reports, counted = "D07", (), _FOUR_BITS


class LateHeadsWithoutDelta(KernelFault):
    """Row sums of dO O are kept for 64 heads: those beyond have 0."""

    id = "D08"

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        delta = super().delta(call, document, out, dout)
        delta[_HEADS:] = 0
        return delta


class MaskOfEarlierRow(KernelFault):
    """Causal masks count rows in 11 bits: row 2,048 of a document sees what row 0 does."""

    id = "D09"
    reports = ("the class of pytorch#162588",)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        mask = super().mask(call, document)
        return mask[..., torch.arange(document.queries) % _ROWS, :] if call.options.causal else mask


class LateRowsUnwritten(KernelFault):
    """dQ has a grid of 2,048 rows a document: those beyond are left as memory was."""

    id = "D10"

    def backward(
        self,
        call: Call,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
    ) -> Gradients:
        dq, *others = super().backward(call, q, k, v, out, lse, dout)
        left = self.allocate(q, "dq")
        for begin, end in self.bounds(call, "q", backward=True):
            written = slice(begin, min(end, begin + _ROWS))
            left[written] = dq[written]
        return (left, *others)  # type: ignore[return-value]
