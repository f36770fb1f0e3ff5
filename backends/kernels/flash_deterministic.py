"""FlashAttention 2 with ``deterministic=True``: the backward promises the same bits every time."""

from __future__ import annotations

import dataclasses

from attn_fuzz.backends.kernels.flash import Flash


class FlashDeterministic(Flash):
    """``flash_attn.flash_attn_varlen_func`` with its deterministic backward."""

    name = "flash_deterministic"
    capabilities = dataclasses.replace(Flash.capabilities, repeatable_backward=True)
    deterministic = True
    call_source, lse_source = (
        source.replace("softcap=SOFTCAP)", "softcap=SOFTCAP, deterministic=True)")
        for source in (Flash.call_source, Flash.lse_source)
    )


KERNEL = FlashDeterministic()
