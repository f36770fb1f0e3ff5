"""Rotary position embeddings of the layer under test."""

from __future__ import annotations

import math

import torch

from attn_fuzz.reference.case import Case


class Rotary:
    """cos and sin tables over positions, made once per packed sequence.

    Angles are formed in float64 and kept as float32: at position 10,000 a float32 angle is already off by 1e-3.
    """

    def __init__(self, case: Case, positions: int, device: torch.device) -> None:
        self.active = case.rotary != "none"
        if not self.active:
            return
        channel = torch.arange(0, case.head_dim, 2, dtype=torch.float64, device=device)
        frequency = torch.exp(channel * (-math.log(case.rotary_theta) / case.head_dim))
        if case.rotary == "proportional":
            turning = math.ceil(case.rotary_fraction * len(frequency))
            frequency = torch.where(torch.arange(len(frequency), device=device) < turning, frequency, 0.0)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), frequency)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def __call__(self, x: torch.Tensor, position_index: torch.Tensor) -> torch.Tensor:
        """Turns ``[tokens, heads, d]`` by each token's position within its document; channels (c, c + d/2) pair up."""
        if not self.active:
            return x
        cos, sin = self.cos[position_index, None], self.sin[position_index, None]
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
