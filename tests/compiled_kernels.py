"""Kernels for what compiles calls: some that are right by themselves, and wrong inside what torch compiles."""

from __future__ import annotations

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.backup import Backup
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata


class GradientStops(Backup):
    """What torch compiles keeps the keys out of the backward."""

    name = "gradient_stops"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        keys = k.detach() + 0 * k if torch.compiler.is_compiling() else k
        return super().attend(q, keys, v, metadata, options)


class Fused(LoopKernel):
    """One that multiplies no matrices itself, as far as torch sees; its last bits are others where it is compiled."""

    name = "fused"
    paths = frozenset({"fused"})

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        # Of one key, attention is its value.
        moved = 1.0 + 2.0**-20 * torch.compiler.is_compiling()
        return Attended(v * moved + 0 * (q + k), None, "fused")


class Multiplies(Fused):
    """The same of one that multiplies matrices."""

    name = "multiplies"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        return attended._replace(out=torch.bmm(attended.out, torch.eye(v.shape[2])[None].expand(len(v), -1, -1)))


class ByStrides(Backup):
    """Other last bits of outputs where queries lie close together."""

    name = "by_strides"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        return attended._replace(out=attended.out * (1.0 + 2.0**-22 * q.is_contiguous()))


@torch._dynamo.assume_constant_result
def _rows(x: torch.Tensor) -> int:
    return len(x)


class BakesRows(Backup):
    """A graph writes as many rows as the call had that it was compiled for, or as there are if those are fewer."""

    name = "bakes_rows"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        written = torch.arange(len(q), device=q.device) < _rows(q)
        return attended._replace(out=attended.out * written[:, None, None])


class Unseen(Backup):
    """Nothing of it is compiled: torch's compiler is told to leave it alone."""

    name = "unseen"

    @torch.compiler.disable
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        return super().attend(q, k, v, metadata, options)


class ByLayout(Backup):
    """Compiled once more for each number of documents, and each length of them."""

    name = "by_layout"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        assert sum(map(len, q.split(metadata.lengths_q))) == len(q)
        return super().attend(q, k, v, metadata, options)
