"""torch's own build of FlashAttention 2, through the operator behind its public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES, FLASH2_PROFILE, flash2_limit
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES, Case


class TorchFlash(Kernel):
    """``torch.ops.aten._flash_attention_forward`` with prefix sums; autograd knows its backward."""

    name = "torch_flash"
    paths = frozenset({"aten._flash_attention_forward"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        max_head_dim=256,
        head_dim_multiple=8,
        softcap=False,
        memories=(*ALIGNED_MEMORIES, "broadcast"),
        lse_of_blind_rows=float("inf"),
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

    call_source = """def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    sums = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    sides = dict(window_size_left=WINDOW[0], window_size_right=0 if CAUSAL else WINDOW[1])
    return torch.ops.aten._flash_attention_forward(q, k, v, *sums, 0.0, CAUSAL, False, scale=SCALE, **sides)[0]"""

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        return flash2_limit(case, calls)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        left, right = options.effective_window
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            metadata.cu_seqlens_q,
            metadata.cu_seqlens_k,
            metadata.max_seqlen_q,
            metadata.max_seqlen_k,
            0.0,
            options.causal,
            False,
            scale=options.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return Attended(out, lse, "aten._flash_attention_forward")


KERNEL = TorchFlash()
