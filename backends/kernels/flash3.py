"""FlashAttention 3 through its own package."""

from __future__ import annotations

import importlib.util
from typing import ClassVar, Final

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES

VALUE_DIMS: Final = (
    *((dim, other) for dim in range(8, 65, 8) for other in range(8, 257, 8) if dim != other),
    *((dim, other) for dim in range(136, 193, 8) for other in range(104, 129, 8)),
)
"""(head_dim, head_dim_v) that its forward takes, as far as its backward goes: up to 64 beside up to 256, and up to 192
beside up to 128. The forward alone takes 512."""


class Flash3(Kernel):
    """``flash_attn_interface.flash_attn_varlen_func``, a Hopper kernel; its public function returns no LSE."""

    name = "flash3"
    paths = frozenset({"flash_attn_interface"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        max_head_dim=256,
        head_dim_multiple=8,
        head_dims_v=VALUE_DIMS,
        softcap=False,
        memories=(*ALIGNED_MEMORIES, "strided", "broadcast"),
        isolates_nonfinite=False,
        repeatable_backward=False,
        graphs=None,
        traceable=None,
        covers_all_rows=False,
        loose_max_seqlen=True,
        # From 65,536 documents on its backward leaves all gradients unwritten, without a word.
        crowds=False,
        far_memories=FAR_MEMORIES,
        gaps=("q", "k"),
        # K and V come in whole tiles, and what a tile holds beside its document is multiplied by 0: NaN comes out.
        finite_rest=True,
    )
    deterministic: ClassVar[bool] = False
    """Whether the backward is asked to add up dQ in a fixed order."""

    call_source = """from flash_attn_interface import flash_attn_varlen_func


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None):
    window = (WINDOW[0], 0) if CAUSAL else WINDOW
    options = dict(softmax_scale=SCALE, causal=CAUSAL, window_size=window)
    bounds = max_seqlen_q, max_seqlen_k, seqused_q, seqused_k
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *bounds, **options)"""

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        if importlib.util.find_spec("flash_attn_interface") is None:
            return "the package flash-attn-3 (flash_attn_interface) is not installed"
        if torch.cuda.get_device_capability()[0] != 9:
            return "needs a Hopper GPU (compute capability 9.0)"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        from flash_attn_interface import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q,
            k,
            v,
            metadata.cu_seqlens_q,
            metadata.cu_seqlens_k,
            metadata.max_seqlen_q,
            metadata.max_seqlen_k,
            seqused_q=metadata.seqused_q,
            seqused_k=metadata.seqused_k,
            softmax_scale=options.scale,
            causal=options.causal,
            window_size=options.effective_window if options.causal else options.window,
            deterministic=self.deterministic,
        )
        return Attended(out[0] if isinstance(out, tuple) else out, None, "flash_attn_interface")


KERNEL = Flash3()
