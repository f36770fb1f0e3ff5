"""How a backend computes: the roundings of its arithmetic, stated as reviewed facts and never as thresholds."""

from __future__ import annotations

import dataclasses
from typing import Final

UNIT_ROUNDOFF: Final = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Half the spacing at 1, u."""

SMALLEST_NORMAL: Final = {"fp32": 2.0**-126, "bf16": 2.0**-126, "fp16": 2.0**-14}

SUBNORMAL_SPACING: Final = {"fp32": 2.0**-126, "bf16": 2.0**-126, "fp16": 2.0**-24}
"""eta, the spacing below the smallest normal number; hardware may flush what fp32 and bf16 have there to zero."""

ROUNDING_SECOND_MOMENT: Final = 0.18
"""E[eps^2] / u^2 of round-to-nearest for mantissas spread as 1 / x."""

ALIKE: Final = 1 / 25
"""Share of the square of the largest error of roundings that agree: they alone reach half of the verdict's limit."""

COARSE: Final = 2.0**-18
"""An exponential with a larger error than this is coarse on purpose, and errs alike for scores that are alike."""

PARTIAL_SUM_KEYS: Final = 512
"""After so many keys of a call dQ is stored, and added to, by what ``stores_partial_sums``."""

ATOMIC_TILE: Final = 16
"""The fewest keys, or query rows, whose share of a gradient is added to it at a time by ``atomic_sums``."""

ACCUMULATION: Final = 8 * 2.0**-24
"""a: relative error of a float32 accumulation with a hardware exponential, per square root of the summed squares."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Which intermediate values a kernel rounds to the storage dtype, beyond those that all of them round.

    The defaults describe FlashAttention: scores, dP and the softmax in float32, P and dS rounded for their products.
    """

    scales_inputs: bool = False
    """q and k are multiplied by the root of the scale and stored before their product."""
    scales_gradients: bool = False
    """dq and dk are stored, then multiplied by (the root of) the scale and stored again."""
    rounds_scores: bool = False
    """S = q k^T is stored in the dtype before the softmax."""
    rounds_dp: bool = False
    """dP = dO v^T is stored in the dtype before dS is formed."""
    delta_from_output: bool = True
    """D = rowsum(dO * O) of the stored O, whose rounding enters."""
    delta_from_probabilities: bool = False
    """D = rowsum(P * dP), where dP's rounding enters. Both hold for a backend that takes one of two ways."""
    rounds_probabilities: bool = True
    """P is rounded to the dtype for its products with V and dO; False: it stays in float32, or in two parts of it."""
    rounds_ds: bool = True
    """dS is rounded to the dtype for its products with K and Q."""
    stores_probabilities: bool = False
    """The backward uses P as stored in the dtype rather than recomputing it in float32."""
    stores_products: bool = False
    """P * dP is stored in the dtype before P * D is taken from it, as torch's softmax does on CUDA."""
    may_store_products: bool = False
    """It is not stated that it does not: what that can do to rows of subnormal products is allowed for, and no more."""
    splits_ds: bool = False
    """dS of the output's gradient and dS of the LSE's come by ways of their own, are stored and then added up."""
    expands_kv: bool = False
    """K/V are repeated over their group: every query head's dK and dV are rounded before they are summed."""
    normalises_by_lse: bool = False
    """P = exp(s - lse) in the forward too, so that the rounding of lse scales the whole output row."""
    exp_error: float = 0.0
    """Largest relative error of the exponential, where it is above the accumulation error."""
    norms_in_dtype: bool = False
    """Layers only: a norm is stored before it is multiplied by its weight, and so are the products of its gradient."""
    rotates_in_dtype: bool = False
    """Layers only: rotary's cos and sin are stored in the dtype, and so is each product with them."""
    float32_angles: bool = False
    """Layers only: rotary's frequencies and angles are float32."""
    stores_partial_sums: bool = False
    """dK and dV are stored, and added to, every 32, 64 or 256 query rows, as torch's flash attention on CPUs does.

    So is dQ, every ``PARTIAL_SUM_KEYS`` keys of the call, across its documents.
    """
    stored_sums: frozenset[str] = frozenset()
    """Layers only: results (``dk``, ``d_query``, ...) whose sums over micro-sequences are kept in the dtype."""
    tanh_error: float = 0.0
    """Largest relative error of the tanh behind softcap (2**-11 for the hardware approximation)."""
    products: str = ""
    """Format of the operands of attention's products, where it is not the dtype: ``tf32``, ``bf16`` or ``fp16``.

    TF32 keeps ten bits behind the point, rounded or cut off.
    """
    projections: str = ""
    """Layers only: the same of the projections before and after attention, forward and backward."""
    scores_dtype: str = ""
    """``bf16`` or ``fp16`` in all dtypes: what S is stored in before the softmax, dP and dS in the backward."""
    probabilities_dtype: str = ""
    """``bf16`` or ``fp16`` in all dtypes: what P is stored in, for all that the backward makes of it too."""
    atomic_sums: frozenset[str] = frozenset()
    """Those of ``dq``, ``dk`` and ``dv`` to which tiles of ``ATOMIC_TILE`` keys or query rows, or more, add in it.

    That is, in the dtype: every tile's share is rounded, and so is the sum each time that one is added, in any order.
    """
