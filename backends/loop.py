"""Varlen attention as a loop over documents, with a hand-written backward that computes the way flash kernels do.

It stands in for the CUDA kernels where there is no GPU, and like them it allocates its outputs without filling them and
writes only the rows that ``cu_seqlens`` covers. Every decision is a method of its own, so that a planted fault can be a
subclass that changes one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.output import as_output


@dataclasses.dataclass
class Document:
    """One document of a call: its slices, head-major float32, one K/V head per query head."""

    index: int
    rows: slice
    keys: slice
    backward: bool
    """Which pass it was sliced for."""
    q: torch.Tensor
    """``[heads, q, d]``"""
    k: torch.Tensor
    """``[heads, k, d]``"""
    v: torch.Tensor

    @property
    def queries(self) -> int:
        return self.q.shape[1]

    @property
    def seen(self) -> int:
        """Keys."""
        return self.k.shape[1]


@dataclasses.dataclass
class Call:
    """One varlen call as the loop sees it."""

    metadata: VarlenMetadata
    options: AttentionOptions
    group: int
    dtype: torch.dtype
    training: bool = True
    """Whether autograd records the call."""
    wanted: tuple[bool, bool, bool] = (True, True, True)
    """Which of q, k and v need a gradient."""
    dlse: torch.Tensor | None = None
    """The LSE's gradient in a backward, float32 ``[heads, tokens_q]``; None where it has none."""
    kept: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """What belongs to the graph from its forward on, for one backward after another."""


@functools.lru_cache(maxsize=1024)
def _window_mask(queries: int, seen: int, shift: int, window: tuple[int, int], device: torch.device) -> torch.Tensor:
    """``Loop.window_mask`` of a document, not to be written to: most documents have sizes that others have, too."""
    distance = torch.arange(queries, device=device)[:, None] + shift - torch.arange(seen, device=device)
    left, right = window
    mask = torch.ones(queries, seen, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance <= left
    if right >= 0:
        mask &= distance >= -right
    return mask


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""dq, dk, dv."""


class Loop:
    """Forward and backward over the documents of a call."""

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        """Where each document lies on the ``q`` or ``k`` side, as the prefix sums say, and ``seqused`` where given."""
        m = call.metadata
        sums, used = (m.cu_seqlens_q, m.seqused_q) if side == "q" else (m.cu_seqlens_k, m.seqused_k)
        if used is None:
            return list(itertools.pairwise(sums.tolist()))
        return [(begin, begin + rows) for begin, rows in zip(sums.tolist(), used.tolist(), strict=False)]

    def allocate(self, like: torch.Tensor, name: str) -> torch.Tensor:
        """Memory for a result; unwritten, as kernels do."""
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        """Rows ``[rows, heads, d]`` of a tensor as ``[heads, rows, d]`` float32."""
        return x[rows].float().transpose(0, 1)

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        """Stores ``[heads, rows, d]`` float32 into a result's rows, in its dtype."""
        result[rows] = value.transpose(0, 1).to(result.dtype)

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        """Which keys each query of a document sees: bool ``[q, k]`` or ``[heads, q, k]``."""
        return self.window_mask(call, document, *call.options.effective_window)

    def shift(self, call: Call, document: Document) -> int:
        """Key position of the first query: bottom-right alignment."""
        return document.seen - document.queries

    def window_mask(self, call: Call, document: Document, left: int, right: int) -> torch.Tensor:
        """The mask of a window (left, right), -1 for no bound."""
        shift, device = self.shift(call, document), call.metadata.device
        return _window_mask(document.queries, document.seen, shift, (left, right), device).clone()

    def expand(self, call: Call, x: torch.Tensor, backward: bool) -> torch.Tensor:
        """K/V ``[kv_heads, k, d]`` to ``[heads, k, d]``."""
        return x.repeat_interleave(call.group, dim=0) if call.group > 1 else x

    def reduce(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """Gradients ``[heads, k, d]`` to ``[kv_heads, k, d]``, added up over each group in float32."""
        return x.unflatten(0, (-1, call.group)).sum(1)

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        """(capped scores, derivative by the uncapped score), float32 ``[heads, q, k]``; a derivative of 1 is one."""
        scores = (document.q @ document.k.transpose(-1, -2)) * call.options.scale
        if not (cap := call.options.softcap):
            return scores, scores.new_ones(1)
        tanh = torch.tanh(scores / cap)
        return cap * tanh, 1 - tanh.square()

    def masked(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Scores with the unseen ones out of the way."""
        return scores.masked_fill(~mask, -torch.inf)

    def softmax(self, call: Call, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised probabilities, lse); rows without keys give 0 and -inf."""
        if masked.shape[-1] == 0:
            return masked, masked.new_full(masked.shape[:-1], -torch.inf)
        lse = torch.logsumexp(masked, -1)
        return torch.exp(masked - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), lse

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """P V of the stored probabilities; ``v`` is the whole tensor."""
        return probabilities.to(call.dtype).float() @ document.v

    def slice(
        self, call: Call, index: int, rows: slice, keys: slice, qkv: tuple[torch.Tensor, ...], *, backward: bool
    ) -> Document:
        """Slices one document out of the packed tensors."""
        q, k, v = qkv
        qd = self.read(call, q, rows, "q")
        kd, vd = (self.expand(call, self.read(call, x, keys, name), backward) for x, name in ((k, "k"), (v, "v")))
        return Document(index, rows, keys, backward, qd, kd, vd)

    def documents(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backward: bool
    ) -> list[Document]:
        """All documents of a call."""
        sides = zip(self.bounds(call, "q", backward=backward), self.bounds(call, "k", backward=backward), strict=False)
        return [
            self.slice(call, index, slice(*rows), slice(*keys), (q, k, v), backward=backward)
            for index, (rows, keys) in enumerate(sides)
        ]

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out as ``q`` with V's channels, lse float32 ``[heads, tokens_q]``)."""
        out = self.allocate(as_output(q, v), "out")
        lse = self.allocate(q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32), "lse")
        for document in self.documents(call, q, k, v, backward=False):
            scores, _ = self.scores(call, document)
            probabilities, row_lse = self.softmax(call, self.masked(scores, self.mask(call, document)))
            self.write(out, document.rows, self.weighted(call, document, probabilities, v), "out")
            self.write_lse(lse, document, row_lse)
        return out, lse

    def write_lse(self, lse: torch.Tensor, document: Document, value: torch.Tensor) -> None:
        """Stores ``[heads, q]``."""
        lse[:, document.rows] = value

    def saved_lse(self, call: Call, lse: torch.Tensor, document: Document) -> torch.Tensor:
        """A document's rows of the saved lse, ``[heads, q]``."""
        return lse[:, document.rows]

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        """rowsum(dO O), ``[heads, q, 1]``; ``dout`` is the document's, ``out`` the whole tensor."""
        return (dout * self.read(call, out, document.rows, "out")).sum(-1, keepdim=True)

    def taken(self, call: Call, document: Document, delta: torch.Tensor) -> torch.Tensor:
        """What is taken from dP: D, less the LSE's gradient; ``[heads, q, 1]``."""
        return delta if call.dlse is None else delta - call.dlse[:, document.rows, None]

    def ds(
        self,
        call: Call,
        document: Document,
        p: torch.Tensor,
        dp: torch.Tensor,
        delta: torch.Tensor,
        slope: torch.Tensor,
    ) -> torch.Tensor:
        """Gradient of the uncapped, unscaled scores."""
        return p * (dp - delta) * slope

    def dp(self, call: Call, document: Document, dout: torch.Tensor) -> torch.Tensor:
        """dO V^T."""
        return dout @ document.v.transpose(-1, -2)

    def dq(self, call: Call, document: Document, ds: torch.Tensor) -> torch.Tensor:
        """scale dS K of the stored dS."""
        return call.options.scale * (ds @ document.k)

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
        """(dq, dk, dv) as q, k, v; probabilities are recomputed from the saved lse."""
        dq, dk, dv = self.allocate(q, "dq"), self.allocate(k, "dk"), self.allocate(v, "dv")
        for document in self.documents(call, q, k, v, backward=True):
            scores, slope = self.scores(call, document)
            row_lse = self.saved_lse(call, lse, document)
            masked = self.masked(scores, self.mask(call, document))
            p = torch.exp(masked - row_lse.masked_fill(row_lse == -torch.inf, 0.0)[..., None])
            doutd = self.read(call, dout, document.rows, "dout")
            delta = self.taken(call, document, self.delta(call, document, out, doutd))
            ds = self.ds(call, document, p, self.dp(call, document, doutd), delta, slope).to(call.dtype).float()
            rounded = p.to(call.dtype).float()
            scale = call.options.scale
            self.write(dq, document.rows, self.dq(call, document, ds), "dq")
            dkd = self.reduce(call, scale * (ds.transpose(-1, -2) @ document.q))
            dvd = self.reduce(call, rounded.transpose(-1, -2) @ doutd)
            self.write(dk, document.keys, dkd, "dk")
            self.write(dv, document.keys, dvd, "dv")
        return self.handed_back(call, (dq, dk, dv))

    def handed_back(self, call: Call, gradients: Gradients) -> Gradients:
        """What the backward gives, once all of it is written."""
        return gradients


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
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        call = dataclasses.replace(ctx.call, dlse=dlse)  # type: ignore[attr-defined]
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv = ctx.loop.backward(call, q, k, v, out, lse, dout)  # type: ignore[attr-defined]
        return dq, dk, dv, None, None


def attend(
    loop: Loop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a loop, differentiable."""
    wanted = (q.requires_grad, k.requires_grad, v.requires_grad)
    call = Call(metadata, options, q.shape[1] // k.shape[1], q.dtype, torch.is_grad_enabled(), wanted)
    return LoopFunction.apply(q, k, v, loop, call)
