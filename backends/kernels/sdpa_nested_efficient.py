"""torch's scaled_dot_product_attention on jagged tensors, its memory-efficient kernel forced."""

from __future__ import annotations

from attn_fuzz.backends.kernels.sdpa_nested_math import ForcedNested


class SdpaNestedEfficient(ForcedNested):
    """The CUTLASS kernel over jagged tensors."""

    name = "sdpa_nested_efficient"
    forced = "efficient"
    paths = frozenset({"nested efficient"})


KERNEL = SdpaNestedEfficient()
