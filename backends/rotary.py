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
            self.tables = _tables(case.head_dim, case.rotary_theta, fraction, rows, device)
            self._at: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, position_index: torch.Tensor) -> torch.Tensor:
        """Turns ``[tokens, heads, d]`` by each token's position within its document; channels (c, c + d/2) pair up."""
        if not self.active:
            return x
        # Queries and keys stand at the same positions.
        if self._at is None or self._at[0] is not position_index:
            self._at = position_index, self.tables.index_select(0, position_index)
        turned: torch.Tensor = _Turned.apply(x, self._at[1])
        return turned


@functools.lru_cache(maxsize=32)
def _tables(head_dim: int, theta: float, fraction: float, positions: int, device: torch.device) -> torch.Tensor:
    """What a channel is multiplied by, cos, and its partner, sin with the partner's sign; pairs behind the leading
    ``fraction`` stay. float32 ``[positions, 1, 2, head_dim]``."""
    # Whoever asks first may be evaluated without autograd, or have work under way on another stream.
    with torch.inference_mode(False):
        channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
        frequency = torch.exp(channel * (-math.log(theta) / head_dim))
        turning = math.ceil(fraction * len(frequency))
        frequency = torch.where(torch.arange(len(frequency), device=device) < turning, frequency, 0.0)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), frequency)
        cos, sin = angles.cos(), angles.sin()
        tables = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).float()[:, None]
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return tables


class _Turned(torch.autograd.Function):
    """A turn and, back, the opposite one; as one step, autograd would take it to a dozen pieces."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(angles)
        return _turned(x, angles, 1.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (angles,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _turned(dy, angles, -1.0), None


def _turned(x: torch.Tensor, angles: torch.Tensor, sign: float) -> torch.Tensor:
    """Pairs ``(a, b)`` to ``(a cos - b sin, b cos + a sin)`` in float32, sin with a sign; stored once, in x's dtype."""
    cos, sin = angles.unbind(-2)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, value=sign).to(x.dtype)
