"""torch's scaled_dot_product_attention on jagged tensors, FlashAttention 2 forced."""

from __future__ import annotations

import dataclasses

from attn_fuzz.backends.kernel import HALF_DTYPES
from attn_fuzz.backends.kernels.sdpa_nested_math import ForcedNested


class SdpaNestedFlash(ForcedNested):
    """FlashAttention 2 over jagged tensors."""

    name = "sdpa_nested_flash"
    forced = "flash"
    paths = frozenset({"nested flash"})
    capabilities = dataclasses.replace(
        ForcedNested.capabilities,
        dtypes=HALF_DTYPES,
        max_head_dim=256,
        # One head dimension for q, k and v.
        head_dims_v=False,
        causal_needs_equal_lengths=False,
        keys_without_queries=False,
    )


KERNEL = SdpaNestedFlash()
