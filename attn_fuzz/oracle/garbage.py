"""What other documents are filled with to see whether a result depends on them: large, and safe in every dtype.

Garbage must not accuse a correct kernel. One that keeps scores or dP in float16 before it masks them makes infinities
of large garbage, and 0 times infinity is NaN in everybody's rows. The size is therefore bounded by what a kernel or a
layer may keep of products with it: scores q k before the scale and after it, dP = dO v, dS <= 2 |dP|, and dq and dk =
scale sum dS k, each of which stays below a quarter of the dtype's largest number.
"""

from __future__ import annotations

from typing import Final

import torch

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.values import largest_norm
from attn_fuzz.reference.weights import NORM_EPSILON

LARGEST: Final = 96.0
"""Where nothing limits it: large beside any value mode."""

_MOST: Final = {"fp16": 65504.0 / 4, "bf16": 3.3e38 / 4, "fp32": 3.4e38 / 4}

_LEAST: Final = 0.375
"""Below this nothing is gained: the drawn values themselves are what is large."""


def _fits(case: Case, queries: float, keys: float, values: float, gradients: float) -> bool:
    """Whether products of rows of at most these Euclidean norms stay below what the dtype holds.

    ``|q k| <= |q| |k|`` (Cauchy-Schwarz), and weights of a row add up to 1.
    """
    scale = case.softmax_scale
    scores, dp = queries * keys, gradients * values
    gradient = abs(scale) * 2 * dp * max(queries, keys)
    return max(scores * max(1.0, abs(scale)), 2 * dp, gradient) <= _MOST[case.dtype]


def kernel_garbage(case: Case) -> float:
    """A negative number for q, k, v and the output gradient of a kernel case: 96, or half of it so often as needed."""
    size = LARGEST
    channels = {"q": case.head_dim, "k": case.head_dim, "v": case.value_dim, "dout": case.value_dim}
    while size > _LEAST:
        rows = [max(dim**0.5 * size, largest_norm(case.values, name, dim)) for name, dim in channels.items()]
        if _fits(case, *rows):
            break
        size /= 2
    return -size


def layer_garbage(case: Case, inputs: LayerInputs) -> float:
    """The same for the input and the output gradient of a layer case, by what its projections make of them."""
    size = LARGEST
    while size > _LEAST and not _fits(case, *_projected(case, inputs, size)):
        size /= 2
    return -size


def _projected(case: Case, inputs: LayerInputs, size: float) -> tuple[float, float, float, float]:
    """Largest norms over rows of q, k, v and the context's gradient, those of garbage among them."""
    weights = {name: weight.double() for name, weight in inputs.weights.items()}
    x, dout = (torch.cat([t.double(), t.new_full((1, t.shape[1]), size).double()]) for t in (inputs.x, inputs.dout))
    q = (x @ weights["query"].T).unflatten(-1, (-1, case.head_dim))
    key_value = (x @ weights["key_value"].T).unflatten(-1, (-1, case.head_dim))
    k, v = (key_value, key_value) if case.shared_key_value else key_value.chunk(2, 1)
    context = (dout @ weights["dense"]).unflatten(-1, (-1, case.head_dim))
    q, k, v = (_normed(x, weights.get(name)) for x, name in ((q, "query_norm"), (k, "key_norm"), (v, "value_norm")))
    norms = [float(rows.norm(dim=-1).max()) for rows in (q, k, v, context)]
    return norms[0], norms[1], norms[2], norms[3]


def _normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """After the RMS norm that the layer has, if any; rotary turns pairs, and leaves norms as they are."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * weight
