"""The LSE as a result that others go on with: its gradient, and calls over parts of the keys that are merged by it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import AttentionOptions, Capabilities
from attn_fuzz.backends.loop import Call, Document


class LseGradientFault(KernelFault):
    """Common to faults of the LSE's gradient."""

    capabilities: ClassVar[Capabilities] = Capabilities(covers_all_rows=False, lse_gradient=True)
    levels: ClassVar[tuple[str, ...]] = ("kernel",)

    def dlse(self, call: Call, document: Document) -> torch.Tensor:
        """A document's ``[heads, q]``."""
        assert call.dlse is not None
        return call.dlse[:, document.rows]

    def taken(self, call: Call, document: Document, delta: torch.Tensor) -> torch.Tensor:
        return delta if call.dlse is None else delta - self.dlse(call, document)[..., None]


class Dropped(LseGradientFault):
    """The LSE is not marked as without a gradient, and the gradient given to it is dropped without a word."""

    id = "S01"
    reports = ("the class of flash-attention#141",)

    def dlse(self, call: Call, document: Document) -> torch.Tensor:
        return torch.zeros_like(super().dlse(call, document))


class GradientOfBase2(LseGradientFault):
    """The LSE that comes back is natural, the gradient given to it is taken for one of its logarithm to base 2."""

    id = "S02"

    def dlse(self, call: Call, document: Document) -> torch.Tensor:
        return super().dlse(call, document) / math.log(2.0)


class GradientOfFirstHead(LseGradientFault):
    """Every query head of a group is given the gradient of the LSE of its first one, as heads are where K/V are."""

    id = "S03"

    def dlse(self, call: Call, document: Document) -> torch.Tensor:
        own = super().dlse(call, document)
        return own[:: call.group].repeat_interleave(call.group, dim=0)


class GradientByStrides(LseGradientFault):
    """The gradient of the LSE is read as if its rows lay side by side, whatever its strides are."""

    id = "S04"

    def dlse(self, call: Call, document: Document) -> torch.Tensor:
        assert call.dlse is not None
        x = call.dlse
        if x.stride(1) == 1 or len(x) == 1:
            return super().dlse(call, document)
        # What lies there belongs to other heads; beyond it nothing is read.
        lying = x.T.reshape(-1)
        heads, rows = len(x), x.shape[1]
        return lying.view(heads, rows)[:, document.rows]


class SignOfLseGradient(LseGradientFault):
    """The gradient of the LSE is taken from dP with D, and not added to it."""

    id = "S05"

    def dlse(self, call: Call, document: Document) -> torch.Tensor:
        return -super().dlse(call, document)


_Queries = tuple[torch.Tensor, AttentionOptions]


class _OverParts(KernelFault):
    """Common to what is kept from one call for the next one over the same queries."""

    levels: ClassVar[tuple[str, ...]] = ("kernel",)

    def __init__(self) -> None:
        self.kept: tuple[_Queries, int, torch.Tensor] | None = None

    def before(self, call: Call, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
        """The LSE of the call before, where that was over the same queries and another number of keys."""
        if self.kept is None:
            return None
        (queries, options), keys, lse = self.kept
        mine = q.shape == queries.shape and q.dtype == queries.dtype and options.scale == call.options.scale
        return lse if mine and keys != len(k) and torch.equal(q, queries) else None

    def given(self, lse: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """What a call gives for its LSE after such another one."""
        raise NotImplementedError

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.before(call, q, k)
        out, lse = super().forward(call, q, k, v)
        self.kept = (q.detach().clone(), call.options), len(k), lse.clone()
        return out, lse if before is None else self.given(lse, before)


class GoesOn(_OverParts):
    """The running sum of a call goes on from that of the call before, where that was over the same queries."""

    id = "S06"

    def given(self, lse: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(lse, before)


class KeptLse(_OverParts):
    """The LSE of a call is kept with its queries, and given for the next call over them, whatever its keys are."""

    id = "S07"

    def given(self, lse: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return before
