"""The buffered attention layer under test: projections, norms, rotary, K/V buffer, kernel, output projection.

A packed sequence is fed one micro-sequence after another; backward takes them in reverse. Past K/V is attended in
place, without concatenation, and its gradient is accumulated in a shared buffer, over exactly the rows attended to.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from attn_fuzz.backends.kernel import AttentionOptions, Kernel
from attn_fuzz.backends.kv_buffer import KeyValueBuffer
from attn_fuzz.backends.metadata import MicroSequenceMetadata, preprocess
from attn_fuzz.backends.output import require_output
from attn_fuzz.backends.rotary import Rotary
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.weights import NORM_EPSILON


class Layer(abc.ABC):
    """What the harness asks of an attention layer over a packed sequence.

    Built from the weights (``reference/weights.py`` names them) and the case, which is read as configuration.
    """

    @abc.abstractmethod
    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Output ``[end - begin, hidden]`` of the next micro-sequence's input of that shape."""

    @abc.abstractmethod
    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        """Input gradient ``[tokens, hidden]`` of the last micro-sequence not yet taken back."""

    @abc.abstractmethod
    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by weight name, float32."""

    @abc.abstractmethod
    def key_value(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The live buffer ``[rows, kv_heads, head_dim]`` of K (after rotary) and V, or None where there is none."""

    @abc.abstractmethod
    def key_value_gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K/V gradients accumulated so far, shaped as the buffer, or None where there are none to see."""

    def paths(self) -> frozenset[str]:
        """Which kernel implementations ran."""
        return frozenset()


LayerFactory = Callable[[dict[str, torch.Tensor], Case, Kernel], Layer]
"""Builds a layer from its weights, the case read as configuration, and a kernel."""


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``, summed up in float32 and stored once.

    torch's half precision products on CPUs are that too, but of small tensors take twice to five times as long as a
    float32 one and three conversions.
    """
    if a.dtype != torch.float32 and a.device.type == "cpu":
        return torch.mm(a.float(), b.float()).to(a.dtype)
    return torch.mm(a, b)


def zeros_like(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 zeros in the weights' shapes, side by side in one allocation, as frameworks keep gradients."""
    counts = [weight.numel() for weight in weights.values()]
    together = torch.zeros(sum(counts), dtype=torch.float32, device=next(iter(weights.values())).device)
    named = zip(weights.items(), together.split(counts), strict=True)
    return {name: zeros.view(weight.shape) for (name, weight), zeros in named}


class Normed(torch.autograd.Function):
    """RMS norm over the last dimension in float32, stored in x's dtype; as one step, autograd would take it to nine.

    Of ``y = n w`` with ``n = x r`` and ``r = rsqrt(mean(x^2) + epsilon)``: ``dw = sum(dy n)``, and with ``g = dy w``
    ``dx = r (g - n mean(g n))``.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        factor = wide.square().mean(-1, keepdim=True).add_(NORM_EPSILON).rsqrt_()
        normed = wide * factor
        ctx.save_for_backward(normed, factor, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normed, factor, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        dweight = (dy * normed).flatten(0, -2).sum(0)
        dnormed = dy * weight
        along = (dnormed * normed).mean(-1, keepdim=True)
        return dnormed.addcmul_(normed, along, value=-1).mul_(factor).to(dy.dtype), dweight


class Projection(torch.autograd.Function):
    """``x @ weight.T``; the weight's gradient is added to a float32 accumulator, as training frameworks keep them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient  # type: ignore[attr-defined]
        return product(x, weight.T)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        ctx.gradient.add_(product(dy.T, x))  # type: ignore[attr-defined]
        return product(dy, weight), None, None


class BufferRegion(torch.autograd.Function):
    """Everything that touches the shared buffer, out of autograd's sight: write, narrow, attend; accumulate, take."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: BufferedLayer,
        metadata: MicroSequenceMetadata,
    ) -> torch.Tensor:
        layer.store(metadata, k, v)
        past_and_own = layer.buffer.read(metadata.first_document_begin, metadata.end)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, *past_and_own)]
            attended = layer.kernel.attend(leaves[0], leaves[1], leaves[2], metadata.varlen, layer.options)
        require_output(attended.out, q, leaves[2])
        layer.ran.add(attended.path)
        ctx.leaves, ctx.out = leaves, attended.out  # type: ignore[attr-defined]
        # The layer holds this graph until it is taken back; a graph that held the layer, too, would never be freed.
        ctx.layer, ctx.buffer, ctx.extent = weakref.proxy(layer), layer.buffer, metadata  # type: ignore[attr-defined]
        return attended.out.detach()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, metadata = ctx.layer, ctx.extent  # type: ignore[attr-defined]
        dq, dk, dv = torch.autograd.grad(ctx.out, ctx.leaves, dout)  # type: ignore[attr-defined]
        del ctx.out, ctx.leaves  # type: ignore[attr-defined]
        return (dq, *layer.key_value_gradient(metadata, dk, dv), None, None)


class BufferedLayer(Layer):
    """The canonical implementation.

    Args:
        weights: parameters, in the case's dtype.
        case: a layer case, read as configuration.
        kernel: the varlen attention to use.
    """

    buffer_type: ClassVar[type[KeyValueBuffer]] = KeyValueBuffer

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        self.case, self.kernel, self.weights = case, kernel, weights
        self.heads = case.heads
        self.device = weights["query"].device
        self.options = AttentionOptions.of(case)
        self.lengths: Sequence[int] = case.packed_lengths
        self.rotary = Rotary(case, max(self.lengths), self.device)
        self.gradients = zeros_like({name: weight for name, weight in weights.items() if weight.dim() == 2})
        self.norms = {
            name: weight.detach().float().requires_grad_()
            for name, weight in weights.items()
            if name not in self.gradients
        }
        self.buffer = self.buffer_type(
            case.tokens + case.capacity, case.kv_heads, case.head_dim, weights["query"].dtype, self.device, case.memory
        )
        self.ran: set[str] = set()
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def preprocess(self, begin: int, end: int) -> MicroSequenceMetadata:
        """Metadata of one micro-sequence."""
        return preprocess(self.lengths, begin, end, causal=self.case.causal, device=self.device).transferred()

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """One projection."""
        return Projection.apply(x, self.weights[name], self.gradients[name])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMS norm over head channels in float32, where the case has it."""
        if name not in self.norms:
            return x
        normed: torch.Tensor = Normed.apply(x, self.norms[name])
        return normed

    def query_key_value(self, x: torch.Tensor, position_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v of one micro-sequence, ready for attention."""
        case = self.case
        q = self.project(x, "query").unflatten(-1, (self.heads, case.head_dim))
        key_value = self.project(x, "key_value").unflatten(-1, (-1, case.head_dim))
        k, v = (key_value, key_value) if case.shared_key_value else key_value.chunk(2, 1)
        q, k, v = (self.norm(q, "query_norm"), self.norm(k, "key_norm"), self.norm(v, "value_norm"))
        return self.rotary(q, position_index), self.rotary(k, self.own_positions(position_index)), v

    def own_positions(self, position_index: torch.Tensor) -> torch.Tensor:
        """Of the queries' positions those of the tokens whose keys are made here: all of them."""
        return position_index

    def store(self, metadata: MicroSequenceMetadata, k: torch.Tensor, v: torch.Tensor) -> None:
        """Puts a micro-sequence's keys and values into the buffer, before anybody attends to them."""
        self.buffer.write(metadata.begin, metadata.end, k, v)

    def key_value_gradient(
        self, metadata: MicroSequenceMetadata, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the gradient over the extent attended to; gives that of the micro-sequence's own keys and values."""
        self.buffer.accumulate(metadata.first_document_begin, metadata.end, dk, dv)
        return self.buffer.gradients(metadata.begin, metadata.end)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: MicroSequenceMetadata
    ) -> torch.Tensor:
        """Attention of one micro-sequence to its active extent."""
        return BufferRegion.apply(q, k, v, self, metadata)

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        metadata = self.preprocess(begin, end)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            q, k, v = self.query_key_value(leaf, metadata.position_index)
            out = self.project(self.attend(q, k, v, metadata).flatten(1), "dense")
        self._pending.append((leaf, out))
        return out.detach()

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        leaf, out = self._pending.pop()
        out.backward(dout)
        assert leaf.grad is not None
        return leaf.grad

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        norms = {name: leaf.grad for name, leaf in self.norms.items() if leaf.grad is not None}
        return {**self.gradients, **norms}

    def key_value(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.buffer.k, self.buffer.v

    def key_value_gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.buffer.dk, self.buffer.dv

    def paths(self) -> frozenset[str]:
        return frozenset(self.ran)
