"""FlashAttention 4 (CuTe DSL) through the flash-attn-4 package. It compiles for every configuration."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Final

import torch

from attn_fuzz.backends.flash4 import VALUE_DIMS, flash4_limit
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Configuration, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES, MEMORIES, Case
from attn_fuzz.reference.profile import Profile

_SHAPES: Final = (("bf16", 64, 4, 2), ("fp16", 128, 2, 2))
_MASKS: Final = ((True, "none"), (True, "left"), (False, "none"), (False, "both"))

CONFIGURATIONS: Final = (
    *(Configuration(*shape, *mask) for shape in _SHAPES for mask in _MASKS),
    Configuration("bf16", 64, 1, 1, True, "none", 20.0),
)


class Flash4(Kernel):
    """``flash_attn.cute.flash_attn_varlen_func``."""

    name = "flash4"
    paths = frozenset({"flash_attn.cute"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        # On Hopper: 8 to 256, says its own check of both head dimensions; not all pairs have a backward.
        max_head_dim=256,
        head_dim_multiple=8,
        head_dims_v=VALUE_DIMS,
        # On Hopper: "GQA backward requires head_dim == head_dim_v", says its own assertion.
        gqa_head_dims_v=False,
        window_convention="(left, right), the row itself not counted, None for no bound",
        memories=MEMORIES,
        isolates_nonfinite=False,
        repeatable_backward=False,
        graphs=None,
        covers_all_rows=False,
        loose_max_seqlen=True,
        lse_gradient=True,
        # 65,535 to 65,537 documents are right, but with all that is asked a case takes a minute and a half.
        crowds=False,
        far_memories=FAR_MEMORIES,
        gaps=("q", "k"),
        # K and V come in whole tiles, and what a tile holds beside its document is multiplied by 0: NaN comes out.
        finite_rest=True,
        compiles=True,
        compiled_first=CONFIGURATIONS,
    )

    # Softcap goes through the hardware's tanh, in its fast-math form.
    profile = Profile(tanh_error=2.0**-11)

    call_source = """from flash_attn.cute import flash_attn_varlen_func


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None):
    window = tuple(None if side < 0 else side for side in WINDOW)
    sums = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    sums |= dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k)
    options = dict(softmax_scale=SCALE, causal=CAUSAL, window_size=window, softcap=SOFTCAP)
    return flash_attn_varlen_func(q, k, v, **sums, **options)[0]"""

    lse_source = call_source.replace("**options)[0]", "**options, return_lse=True)[:2]")

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        return flash4_limit(case)

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        # The package shares its parent with FlashAttention 2, which may be there without it.
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            return "the package flash-attn-4 (flash_attn.cute) is not installed"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        # Compiled objects are then shared with other processes; read when the package is imported.
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        from flash_attn.cute import flash_attn_varlen_func

        out, lse = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            seqused_q=metadata.seqused_q,
            seqused_k=metadata.seqused_k,
            softmax_scale=options.scale,
            causal=options.causal,
            # -1 on one side alone would be taken literally.
            window_size=tuple(None if side < 0 else side for side in options.window),
            softcap=options.softcap,
            return_lse=True,
        )[:2]
        return Attended(out, lse, "flash_attn.cute")


KERNEL = Flash4()
