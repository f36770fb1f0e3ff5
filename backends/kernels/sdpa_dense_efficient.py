"""torch's scaled_dot_product_attention with an explicit mask, its memory-efficient kernel forced."""

from __future__ import annotations

import dataclasses

from attn_fuzz.backends.kernels.sdpa_dense_math import ForcedDense
from attn_fuzz.backends.sdpa import MOST_MASKED


class SdpaDenseEfficient(ForcedDense):
    """The CUTLASS kernel."""

    name = "sdpa_dense_efficient"
    forced = "efficient"
    paths = frozenset({"dense efficient"})
    capabilities = dataclasses.replace(
        ForcedDense.capabilities,
        devices=("cuda",),
        head_dim_multiple=8,
        head_dims_v=True,
        queries_without_keys=True,
        most_scores=MOST_MASKED,
    )


KERNEL = SdpaDenseEfficient()
