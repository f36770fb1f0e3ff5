"""torch's scaled_dot_product_attention with an explicit mask, cuDNN forced. It plans for every shape."""

from __future__ import annotations

import dataclasses
from typing import Final

from attn_fuzz.backends.flash2 import ALIKE_MEMORIES
from attn_fuzz.backends.kernel import HALF_DTYPES, Configuration
from attn_fuzz.backends.kernels.sdpa_dense_math import ForcedDense

CONFIGURATIONS: Final = (
    Configuration("bf16", 64, 4, 2, True),
    Configuration("bf16", 64, 4, 2, True, "left"),
    Configuration("fp16", 128, 2, 2, False),
    Configuration("fp16", 32, 1, 1, False, "both"),
    Configuration("bf16", 8, 1, 1, True),
)


class SdpaDenseCudnn(ForcedDense):
    """cuDNN's kernel; the mask is an operand, so that its shape alone is planned for."""

    name = "sdpa_dense_cudnn"
    forced = "cudnn"
    paths = frozenset({"dense cudnn"})
    capabilities = dataclasses.replace(
        ForcedDense.capabilities,
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        max_head_dim=128,
        head_dim_multiple=8,
        head_dims_v=True,
        scale=False,
        memories=ALIKE_MEMORIES,
        compiles=True,
        compiled_first=CONFIGURATIONS,
        layouts=12,
    )


KERNEL = SdpaDenseCudnn()
