"""The parameters of the layer under test: their names, shapes and values."""

from __future__ import annotations

import torch

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.values import draw_norm, draw_weight

NORM_EPSILON = 1e-5


def layer_weights(case: Case, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Parameters of a layer case, in its dtype; projections apply as ``x @ weight.T``.

    Returns:
        ``query [heads * head_dim, hidden]``; ``key_value [2 * kv_heads * head_dim, hidden]`` with all keys before all
        values, or ``[kv_heads * head_dim, hidden]`` where they are shared; ``dense [hidden, heads * head_dim]``; and
        ``query_norm``, ``key_norm``, ``value_norm [head_dim]`` where the case has them.
    """
    kv_rows = (1 if case.shared_key_value else 2) * case.kv_heads * case.head_dim
    weights = {
        "query": draw_weight(case, "query", case.heads * case.head_dim, case.hidden, device),
        "key_value": draw_weight(case, "key_value", kv_rows, case.hidden, device),
        "dense": draw_weight(case, "dense", case.hidden, case.heads * case.head_dim, device),
    }
    for name in ("query_norm", "key_norm", "value_norm"):
        if getattr(case, name) != "none":
            weights[name] = draw_norm(case, name, device)
    return weights
