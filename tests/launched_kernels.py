"""Kernels for what launches calls otherwise: a right one, and some that keep what they should not, or wait."""

from __future__ import annotations

from typing import Any

import torch
from recorded import FakeStreams

from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.backup import Backup
from attn_fuzz.backends.metadata import VarlenMetadata


class OnDevice(Backup):
    """A kernel that goes by what its prefix sums hold on the device, and by nothing that a host knows."""

    name = "on_device"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        if FakeStreams.current is not None:
            FakeStreams.current.wait()
        return super().attend(q, k, v, metadata, options)


class BakesLengths(OnDevice):
    """The prefix sums are made of lengths that the host knows: a graph keeps those of its capture."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        m = metadata
        baked = VarlenMetadata(lengths_q=m.lengths_q, lengths_k=m.lengths_k, device=m.device)
        return super().attend(q, k, v, baked, options)


class ScaleOfCapture(OnDevice):
    """A factor that depends on the values is read when it is captured, by way of memory that the host sees."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        # As lists do, which no mode of torch's dispatcher sees.
        largest = max(abs(x) for x in v.detach().flatten().float().tolist())
        attended = super().attend(q, k, v / largest, metadata, options)
        return attended._replace(out=attended.out * largest)


class SharedWorkspace(OnDevice):
    """Results lie in a workspace that all calls share, as large as the largest."""

    def __init__(self) -> None:
        self._workspace = torch.empty(0)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        if self._workspace.numel() < q.numel() or self._workspace.dtype != q.dtype:
            self._workspace = torch.empty(q.numel(), dtype=q.dtype, device=q.device)
        return attended._replace(out=_Into.apply(attended.out, self._workspace[: q.numel()].view(q.shape)))


class _Into(torch.autograd.Function):
    """A copy in memory that is there already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return place.copy_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0], None


class ReadsOnHost(OnDevice):
    """The longest document is asked for on the device, and waited for."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        assert int(metadata.cu_seqlens_q.diff().max()) > 0
        return super().attend(q, k, v, metadata, options)


class ReadsInBackward(OnDevice):
    """The backward looks at its gradient before it does anything."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        return attended._replace(out=_Looks.apply(attended.out))


class _Looks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        assert gradients[0].abs().max().item() >= 0
        return gradients[0]


class OnDefaultStream(OnDevice):
    """Runs on the default stream, whatever the current one is."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        with torch.cuda.stream(torch.cuda.default_stream(q.device)):
            return super().attend(q, k, v, metadata, options)
