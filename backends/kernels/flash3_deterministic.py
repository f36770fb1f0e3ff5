"""FlashAttention 3 with ``deterministic=True``: the backward promises the same bits every time."""

from __future__ import annotations

import dataclasses

from attn_fuzz.backends.kernels.flash3 import VALUE_DIMS, Flash3


class Flash3Deterministic(Flash3):
    """``flash_attn_interface.flash_attn_varlen_func`` with its deterministic backward."""

    name = "flash3_deterministic"
    capabilities = dataclasses.replace(
        Flash3.capabilities,
        max_head_dim=192,
        head_dims_v=tuple(pair for pair in VALUE_DIMS if max(pair) <= 192),
        repeatable_backward=True,
    )
    deterministic = True
    call_source = Flash3.call_source.replace("window_size=window)", "window_size=window, deterministic=True)")


KERNEL = Flash3Deterministic()
