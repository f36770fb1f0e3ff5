"""Varlen attention as a loop over documents, with a hand-written backward that computes the way flash kernels do.

It stands in for the CUDA kernels where there is no GPU, and like them it allocates its outputs without filling them and
writes only the rows that ``cu_seqlens`` covers. Every decision is a method of its own, so that a planted fault can be a
subclass that changes one of them.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from backends.kernel import AttentionOptions
from backends.metadata import VarlenMetadata


@dataclasses.dataclass
class Document:
    """One document of a call: its slices, head-major float32, one K/V head per query head."""

    rows: slice
    keys: slice
    q: torch.Tensor
    """``[heads, q, d]``"""
    k: torch.Tensor
    """``[heads, k, d]``"""
    v: torch.Tensor
    mask: torch.Tensor
    """bool ``[q, k]``"""


@dataclasses.dataclass
class Call:
    """One varlen call as the loop sees it."""

    metadata: VarlenMetadata
    options: AttentionOptions
    group: int
    dtype: torch.dtype


class Loop:
    """Forward and backward over the documents of a call."""

    def bounds(self, cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
        """Where each document lies, as the prefix sums say."""
        sums: list[int] = cu_seqlens.tolist()
        return list(itertools.pairwise(sums))

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for a result; unwritten, as kernels do."""
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def mask(self, call: Call, queries: int, keys: int) -> torch.Tensor:
        """Which keys each query of a document sees."""
        left, right = call.options.effective_window
        device = call.metadata.device
        distance = torch.arange(queries, device=device)[:, None] + (keys - queries) - torch.arange(keys, device=device)
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= distance >= -right
        return seen

    def expand(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """K/V ``[k, kv_heads, d]`` to ``[heads, k, d]`` float32."""
        return x.float().transpose(0, 1).repeat_interleave(call.group, dim=0)

    def reduce(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """Gradients ``[heads, k, d]`` to ``[k, kv_heads, d]``, added up over each group in float32."""
        return x.unflatten(0, (-1, call.group)).sum(1).transpose(0, 1)

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        """(capped scores, derivative by the uncapped score), float32 ``[heads, q, k]``."""
        scores = (document.q @ document.k.transpose(-1, -2)) * call.options.scale
        if not (cap := call.options.softcap):
            return scores, torch.ones_like(scores)
        tanh = torch.tanh(scores / cap)
        return cap * tanh, 1 - tanh.square()

    def softmax(self, scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(unnormalised probabilities' normalised form, lse); rows without keys give 0 and -inf."""
        if scores.shape[-1] == 0:
            return scores, scores.new_full(scores.shape[:-1], -torch.inf)
        masked = scores.masked_fill(~mask, -torch.inf)
        lse = torch.logsumexp(masked, -1)
        return torch.exp(masked - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), lse

    def document(
        self, call: Call, rows: slice, keys: slice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Document:
        """Slices one document out of the packed tensors."""
        qd, kd, vd = (q[rows].float().transpose(0, 1), self.expand(call, k[keys]), self.expand(call, v[keys]))
        return Document(rows, keys, qd, kd, vd, self.mask(call, qd.shape[1], kd.shape[1]))

    def documents(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Document]:
        """All documents of a call."""
        return [
            self.document(call, slice(*rows), slice(*keys), q, k, v)
            for rows, keys in zip(
                self.bounds(call.metadata.cu_seqlens_q), self.bounds(call.metadata.cu_seqlens_k), strict=True
            )
        ]

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out as ``q``, lse float32 ``[heads, tokens_q]``)."""
        out = self.allocate(q)
        lse = self.allocate(q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32))
        for document in self.documents(call, q, k, v):
            scores, _ = self.scores(call, document)
            probabilities, row_lse = self.softmax(scores, document.mask)
            value = probabilities.to(call.dtype).float() @ document.v
            out[document.rows] = value.transpose(0, 1).to(call.dtype)
            lse[:, document.rows] = row_lse
        return out, lse

    def backward(
        self,
        call: Call,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) as q, k, v; probabilities are recomputed from the saved lse."""
        dq, dk, dv = self.allocate(q), self.allocate(k), self.allocate(v)
        for document in self.documents(call, q, k, v):
            rows, keys = document.rows, document.keys
            scores, slope = self.scores(call, document)
            row_lse = lse[:, rows]
            masked = scores.masked_fill(~document.mask, -torch.inf)
            probabilities = torch.exp(masked - row_lse.masked_fill(row_lse == -torch.inf, 0.0)[..., None])
            doutd = dout[rows].float().transpose(0, 1)
            delta = (doutd * out[rows].float().transpose(0, 1)).sum(-1, keepdim=True)
            dp = doutd @ document.v.transpose(-1, -2)
            ds = (probabilities * (dp - delta) * slope).to(call.dtype).float()
            rounded = probabilities.to(call.dtype).float()
            scale = call.options.scale
            dq[rows] = (scale * (ds @ document.k)).transpose(0, 1).to(call.dtype)
            dk[keys] = self.reduce(call, scale * (ds.transpose(-1, -2) @ document.q)).to(call.dtype)
            dv[keys] = self.reduce(call, rounded.transpose(-1, -2) @ doutd).to(call.dtype)
        return dq, dk, dv


class LoopFunction(torch.autograd.Function):
    """Autograd around a ``Loop``."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        loop: Loop,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = loop.forward(call, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.loop, ctx.call = loop, call  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dout: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        dq, dk, dv = ctx.loop.backward(ctx.call, q, k, v, out, lse, dout)  # type: ignore[attr-defined]
        return dq, dk, dv, None, None


def attend(
    loop: Loop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a loop, differentiable."""
    call = Call(metadata, options, q.shape[1] // k.shape[1], q.dtype)
    return LoopFunction.apply(q, k, v, loop, call)
