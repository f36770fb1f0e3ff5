"""FlashAttention 2 through the flash-attn package."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES, FLASH2_PROFILE, flash2_limit
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES, Case


class Flash(Kernel):
    """``flash_attn.flash_attn_varlen_func``."""

    name = "flash"
    paths = frozenset({"flash_attn_varlen_func"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        max_head_dim=256,
        memories=(*ALIGNED_MEMORIES, "strided", "broadcast"),
        lse_of_blind_rows=math.inf,
        repeatable_backward=False,
        graphs=None,
        traceable=None,
        covers_all_rows=False,
        loose_max_seqlen=True,
        # 65,536 documents and more are more than its grids take, which is an error ("invalid argument").
        crowds=False,
        far_memories=FAR_MEMORIES,
    )
    profile = FLASH2_PROFILE
    deterministic: ClassVar[bool] = False
    """Whether the backward is asked to add up dQ in a fixed order."""
    call_source = """from flash_attn import flash_attn_varlen_func


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    window = (WINDOW[0], 0) if CAUSAL else WINDOW
    options = dict(softmax_scale=SCALE, causal=CAUSAL, window_size=window, softcap=SOFTCAP)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)"""

    lse_source = call_source.replace("**options)", "**options, return_attn_probs=True)[:2]")

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        return flash2_limit(case, calls)

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        # FlashAttention 4 has the same name, and no module of it.
        if (spec := importlib.util.find_spec("flash_attn")) is None or spec.origin is None:
            return "the package flash-attn is not installed"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        from flash_attn import flash_attn_varlen_func

        out, lse, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            metadata.cu_seqlens_q,
            metadata.cu_seqlens_k,
            metadata.max_seqlen_q,
            metadata.max_seqlen_k,
            softmax_scale=options.scale,
            causal=options.causal,
            window_size=options.effective_window if options.causal else options.window,
            softcap=options.softcap,
            deterministic=self.deterministic,
            return_attn_probs=True,
        )
        return Attended(out, lse, "flash_attn_varlen_func")


KERNEL = Flash()
