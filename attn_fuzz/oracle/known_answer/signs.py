"""Random signs that known-answer inputs are made of, a document's own."""

from __future__ import annotations

import torch

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.values import draw


def drawn(
    case: Case, name: str, heads: int, device: torch.device | str, *, keys: bool, values: bool = False
) -> torch.Tensor:
    """Normal numbers in float32, a document's own, in every value mode alike.

    Args:
        case: a kernel case.
        name: decides them.
        heads: per row.
        device: where.
        keys: a row for each key, and not for each query.
        values: with the channels of values, and not of queries and keys.

    Returns:
        ``[tokens, heads, channels]``.
    """
    plain = case.replace(values="gaussian", dtype="fp32")
    return draw(plain, name, heads, case.value_dim if values else case.head_dim, device, keys=keys)


def signs(
    case: Case, name: str, heads: int, device: torch.device | str, *, keys: bool, values: bool = False
) -> torch.Tensor:
    """Random signs ``[tokens, heads, channels]``, a document's own; see ``drawn``."""
    return torch.where(drawn(case, name, heads, device, keys=keys, values=values) < 0, -1.0, 1.0)
