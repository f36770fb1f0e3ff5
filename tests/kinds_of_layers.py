"""Layers as users have them: the canonical one, otherwise in one respect; right ones, and wrong ones beside them.

A file that ``check-layer`` takes: every class here is built as ``CLASS(weights, case)``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, ClassVar

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.backends.rotary import Rotary
from attn_fuzz.reference.case import Case

Pair = tuple[torch.Tensor, torch.Tensor]


class Plain(BufferedLayer):
    """The canonical one."""

    capabilities: ClassVar[dict[str, Any]] = {}

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        super().__init__(weights, case, registry.load("loop").kernel)


# Rotary.


class PackedUndeclared(Plain):
    """Rotary by position in the packed sequence."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        super().__init__(weights, case)
        self.rotary = Rotary(case, case.tokens, self.device)

    def positions(self, begin: int, end: int) -> torch.Tensor:
        return torch.arange(begin, end, device=self.device)

    def preprocess(self, begin: int, end: int) -> MicroSequenceMetadata:
        # No copy of what has been worked out of it.
        made = copy.copy(super().preprocess(begin, end))
        vars(made)["position_index"] = self.positions(begin, end)
        return made


class Packed(PackedUndeclared):
    capabilities: ClassVar[dict[str, Any]] = {"rotary_positions": "packed"}


class PackedInFloat32(Packed):
    """Frequencies and angles are float32, as models compute them; so is the turning."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        super().__init__(weights, case)
        if self.rotary.active:
            channel = torch.arange(0, case.head_dim, 2, dtype=torch.float32, device=self.device)
            frequency = 1.0 / case.rotary_theta ** (channel / case.head_dim)
            if case.rotary == "proportional":
                frequency[math.ceil(case.rotary_fraction * len(frequency)) :] = 0
            angles = torch.arange(case.tokens, dtype=torch.float32, device=self.device)[:, None] * frequency
            self.rotary.cos, self.rotary.sin = angles.cos(), angles.sin()


class PackedInDtype(PackedInFloat32):
    """Cos and sin are stored in the dtype, and so are products with them."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        super().__init__(weights, case)
        self.tables = self.rotary
        self.rotary = self.turned  # type: ignore[assignment]

    def turned(self, x: torch.Tensor, position_index: torch.Tensor) -> torch.Tensor:
        if not self.tables.active:
            return x
        cos, sin = (table.to(x.dtype)[position_index.long(), None] for table in (self.tables.cos, self.tables.sin))
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class PackedFromEveryCut(Packed):
    """Positions begin anew with each micro-sequence."""

    def positions(self, begin: int, end: int) -> torch.Tensor:
        return torch.arange(end - begin, device=self.device)


class NotPackedAtAll(Plain):
    """Positions are those in the document, though it says otherwise."""

    capabilities: ClassVar[dict[str, Any]] = {"rotary_positions": "packed"}


# Gradient rows.


class ConsumingUndeclared(Plain):
    """Takes the gradient rows of its own micro-sequence, and zeroes them."""

    def key_value_gradient(
        self, metadata: MicroSequenceMetadata, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        taken = super().key_value_gradient(metadata, dk, dv)
        own = [x.clone() for x in taken]
        self.consume(metadata.begin, metadata.end)
        return own[0], own[1]

    def consume(self, begin: int, end: int) -> None:
        self.buffer.dk[begin:end] = 0
        self.buffer.dv[begin:end] = 0


class Consuming(ConsumingUndeclared):
    capabilities: ClassVar[dict[str, Any]] = {"gradient_rows": "consumed"}


class WritingOver(Consuming):
    """Leaves anything there."""

    def consume(self, begin: int, end: int) -> None:
        self.buffer.dk[begin:end] = torch.nan
        self.buffer.dv[begin:end] *= -3


class ConsumingTooMuch(Consuming):
    """Zeroes a row of the micro-sequence before, too."""

    def consume(self, begin: int, end: int) -> None:
        super().consume(max(begin - 1, 0), end)


class ConsumingLate(Consuming):
    """Zeroes rows of the micro-sequence behind, which nobody reads any more: it wrote outside all the same."""

    def consume(self, begin: int, end: int) -> None:
        super().consume(begin, end)
        self.buffer.dk[end : end + 1] = 7


# One object for several sequences.


class Reusable(Plain):
    capabilities: ClassVar[dict[str, Any]] = {"reusable": True}

    def restart(self, case: Case) -> None:
        Plain.__init__(self, self.weights, case)


class KeepsGradients(Reusable):
    """Parameter gradients of the sequence before are added to."""

    def restart(self, case: Case) -> None:
        before = self.gradients
        super().restart(case)
        self.gradients = before


class KeepsGradientRows(Reusable):
    """K/V gradients of the sequence before are added to, where its buffer is large enough."""

    def restart(self, case: Case) -> None:
        before = self.buffer
        super().restart(case)
        if len(before.dk) >= case.tokens:
            self.buffer.dk, self.buffer.dv = before.dk, before.dv


class KeepsLengths(Reusable):
    """Documents are where they were in the sequence before, as far as that goes."""

    def restart(self, case: Case) -> None:
        before = self.lengths
        super().restart(case)
        if sum(before) == case.tokens:
            self.lengths = before
        elif sum(before) > case.tokens:
            kept = list(before)
            while kept and sum(kept) > case.tokens:
                kept[-1] -= sum(kept) - case.tokens
                if kept[-1] <= 0:
                    kept.pop()
            self.lengths = [*kept, *([case.tokens - sum(kept)] if sum(kept) < case.tokens else [])]


class KeepsRows(Reusable):
    """Keys are appended behind those of the sequence before."""

    def restart(self, case: Case) -> None:
        frontier = self.buffer.frontier
        super().restart(case)
        self.buffer.frontier = frontier


# Live parameter gradients.


class LiveGradients(Plain):
    """All objects add to one piece of memory, which the next one zeroes: a module that persists, and its ``.grad``.

    What is handed out lies there. Sequences do not overlap in it: each adds up what it has for itself, and writes it
    there when it is asked.
    """

    memory: ClassVar[torch.Tensor] = torch.zeros(1 << 22)

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        found, taken = {}, 0
        for name, gradient in super().parameter_gradients().items():
            live = self.memory[taken : taken + gradient.numel()].view_as(gradient)
            taken += gradient.numel()
            found[name] = live.copy_(gradient)
        return found

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        self.memory.fill_(-5)
        super().__init__(weights, case)


class LiveLeak(LiveGradients):
    """What nobody has written gets into one of them."""

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        self.gradients["dense"].flatten()[0] += 1e-30 * torch.empty(4096, device=self.device)[100]
        return dx


class LiveShared(LiveGradients):
    """All sequences in flight add up in the same memory."""

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        return BufferedLayer.parameter_gradients(self)

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        super().__init__(weights, case)
        taken = 0
        for name, gradient in self.gradients.items():
            self.gradients[name] = self.memory[taken : taken + gradient.numel()].view_as(gradient).fill_(0)
            taken += gradient.numel()


# Evaluation.


class Evaluating(Plain):
    capabilities: ClassVar[dict[str, Any]] = {"evaluation": True}

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return super().forward(x.clone(), begin, end)


class EvaluatingWrongly(Evaluating):
    """Without autograd, what stands before the micro-sequence is forgotten."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return super().forward(x, begin, end) * (1.0 if torch.is_grad_enabled() or begin == 0 else 1.25)


class NeedingAutograd(Evaluating):
    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        assert torch.is_grad_enabled()
        return super().forward(x, begin, end)


class ForwardOnly:
    """No backward at all."""

    capabilities: ClassVar[dict[str, Any]] = {"backward": False}

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        self.inner = Plain(weights, case)

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        with torch.inference_mode(False):
            return self.inner.forward(x.clone(), begin, end)

    def key_value(self) -> Pair | None:
        return self.inner.key_value()


class Inference:
    """No autograd anywhere: what is made under ``torch.inference_mode`` stays what that makes."""

    capabilities: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("backward", "norms", "shared_key_value", "window", "softcap", "noncausal"), False),
        "rotaries": ["none"],
    }

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        self.weights, self.case = weights, case
        lengths = torch.tensor(case.packed_lengths)
        self.document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(weights["query"].device)
        self.past: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        case, weights = self.case, self.weights
        q = (x @ weights["query"].T).unflatten(1, (case.heads, -1))
        self.past.append((x @ weights["key_value"].T).unflatten(1, (2 * case.kv_heads, -1)))
        k, v = torch.cat(self.past).chunk(2, dim=1)
        row, key = torch.arange(begin, end, device=x.device), torch.arange(end, device=x.device)
        mask = (self.document[begin:end, None] == self.document[:end]) & (key <= row[:, None])
        heads = (y.transpose(0, 1) for y in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        context = attend(*heads, mask, scale=case.softmax_scale, enable_gqa=True)
        return context.transpose(0, 1).flatten(1) @ weights["dense"].T

    def key_value(self) -> Pair | None:
        if not self.past:
            return None
        k, v = torch.cat(self.past).chunk(2, dim=1)
        return k, v


class ForwardOnlyWrongly(ForwardOnly):
    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return super().forward(x, begin, end) * (1.0 if begin == 0 else 1.25)


# Padding.


class ZeroPadding(Plain):
    """Padding has no gradient and gives zeros."""

    capabilities: ClassVar[dict[str, Any]] = {"padding": "zero"}
    leave: ClassVar[float] = 0.0

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Those of padding in a micro-sequence, bool ``[end - begin]``."""
        found = torch.zeros(self.case.tokens, dtype=torch.bool, device=self.device)
        for first, last in self.case.padding_spans:
            found[first:last] = True
        return found[begin:end]

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        self.parts = [*getattr(self, "parts", []), (begin, end)]
        out = super().forward(x, begin, end)
        out[self.rows(begin, end)] = self.leave
        return out

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        rows = self.rows(*self.parts.pop())
        dout = dout.clone()
        dout[rows] = 0
        dx = super().backward(dout)
        dx[rows] = self.leave
        return dx


class SkippedPadding(ZeroPadding):
    """Nothing is computed of it, and nothing written."""

    capabilities: ClassVar[dict[str, Any]] = {"padding": "skipped"}

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        rows, found = self.rows(begin, end), torch.empty_like(out)
        found[~rows] = out[~rows]
        # Values of padding are read by padding only, whose results are left out.
        self.buffer.v[begin:end][rows] = 3.0
        return found


class SkippedUndeclared(SkippedPadding):
    capabilities: ClassVar[dict[str, Any]] = {}


class PaddingLeaks(ZeroPadding):
    """The gradients of padding reach the weights."""

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        rows = self.rows(*self.parts.pop())
        dx = Plain.backward(self, dout)
        dx[rows] = 0
        return dx


class PaddingNotZero(ZeroPadding):
    leave: ClassVar[float] = 1e-3


class ZeroBetween(ZeroPadding):
    """Padding stands between documents, too."""

    capabilities: ClassVar[dict[str, Any]] = {"padding": "zero", "padding_between": True}


class SkippedBetween(SkippedPadding):
    capabilities: ClassVar[dict[str, Any]] = {"padding": "skipped", "padding_between": True}


class OnlyBehind(ZeroBetween):
    """Rows between documents are taken for documents, though it says otherwise."""

    def rows(self, begin: int, end: int) -> torch.Tensor:
        found = super().rows(begin, end)
        found[: max(sum(self.case.lengths) - begin, 0)] = False
        return found


class BetweenLeaks(PaddingLeaks):
    """The gradients of rows between documents reach the weights."""

    capabilities: ClassVar[dict[str, Any]] = ZeroBetween.capabilities


class BetweenSeen(SkippedBetween):
    """What stands between documents belongs to the one before it, whose rows it sees and adds gradients to."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        super().__init__(weights, case)
        lengths = list(self.lengths)
        for place in reversed(range(1, len(case.lengths))):
            if case.packed_ids[place] in case.padding_ids:
                lengths[place - 1] += lengths.pop(place)
        self.lengths = tuple(lengths)


# Non-causal attention.


class UncutNonCausal(Plain):
    """Non-causal attention in a single micro-sequence."""

    capabilities: ClassVar[dict[str, Any]] = {"noncausal_cuts": False}

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        assert self.case.causal or (begin, end) == (0, self.case.tokens)
        return super().forward(x, begin, end)


class UncutNonCausalWrongly(UncutNonCausal):
    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        super().__init__(weights, case)
        if not case.causal:
            self.options = dataclasses.replace(self.options, scale=1.5 * self.options.scale)
