"""Random signs that known-answer inputs are made of, a document's own."""

from __future__ import annotations

import torch

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.values import draw


def drawn(case: Case, name: str, heads: int, device: torch.device | str, *, keys: bool) -> torch.Tensor:
    """Normal numbers ``[tokens, heads, head_dim]`` in float32, a document's own, in every value mode alike."""
    plain = case.replace(values="gaussian", dtype="fp32")
    return draw(plain, name, heads, case.head_dim, device, keys=keys)


def signs(case: Case, name: str, heads: int, device: torch.device | str, *, keys: bool) -> torch.Tensor:
    """Random signs ``[tokens, heads, head_dim]``, a document's own."""
    return torch.where(drawn(case, name, heads, device, keys=keys) < 0, -1.0, 1.0)
