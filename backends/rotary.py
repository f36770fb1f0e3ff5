"""Rotary position embeddings of the layer under test."""

from __future__ import annotations

import functools
import math

import torch

from attn_fuzz.reference.case import Case


class Rotary:
    """Turns channel pairs by cos and sin of angles that grow with the position.

    Angles are formed in float64 and kept as float32: at position 10,000 a float32 angle is already off by 1e-3.

    Args:
        case: a layer case.
        positions: how many there are at least.
        device: where.
    """

    def __init__(self, case: Case, positions: int, device: torch.device) -> None:
        self.active = case.rotary != "none"
        if self.active:
            fraction = case.rotary_fraction if case.rotary == "proportional" else 1.0
            # Layers of one configuration have tables in common, whatever their lengths.
            rows = 1 << max(positions - 1, 15).bit_length()
            self.cos, self.sin = _tables(case.head_dim, case.rotary_theta, fraction, rows, device)

    def __call__(self, x: torch.Tensor, position_index: torch.Tensor) -> torch.Tensor:
        """Turns ``[tokens, heads, d]`` by each token's position within its document; channels (c, c + d/2) pair up."""
        if not self.active:
            return x
        cos, sin = (table.index_select(0, position_index)[:, None] for table in (self.cos, self.sin))
        turned: torch.Tensor = _Turned.apply(x, cos, sin)
        return turned


@functools.lru_cache(maxsize=32)
def _tables(
    head_dim: int, theta: float, fraction: float, positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 ``[positions, head_dim // 2]``; pairs behind the leading ``fraction`` are not turned."""
    # Whoever asks first may be evaluated without autograd, or have work under way on another stream.
    with torch.inference_mode(False):
        channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
        frequency = torch.exp(channel * (-math.log(theta) / head_dim))
        turning = math.ceil(fraction * len(frequency))
        frequency = torch.where(torch.arange(len(frequency), device=device) < turning, frequency, 0.0)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), frequency)
        tables = angles.cos().float(), angles.sin().float()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return tables


class _Turned(torch.autograd.Function):
    """A turn and, back, the opposite one; as one step, autograd would take it to a dozen pieces."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _turned(dy, cos, sin, -1.0), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """Pairs ``(a, b)`` to ``(a cos - b sin, b cos + a sin)`` in float32, sin with a sign; stored in x's dtype."""
    first, second = x.float().chunk(2, -1)
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    left, right = turned.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=sign)
    return turned.to(x.dtype)
