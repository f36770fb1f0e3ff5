"""cuDNN attention through the cudnn-frontend package. It plans for every shape, in one to two seconds each."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Final

import torch

from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Configuration, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import MEMORIES, Case
from attn_fuzz.reference.profile import Profile

CONFIGURATIONS: Final = (
    Configuration("bf16", 64, 4, 2, True),
    Configuration("bf16", 64, 4, 2, True, "left"),
    Configuration("bf16", 64, 4, 2, False),
    Configuration("fp16", 128, 2, 2, True),
    Configuration("fp16", 128, 2, 2, False, "both"),
)


class CudnnFrontend(Kernel):
    """``cudnn.sdpa_torch`` over packed tensors."""

    name = "cudnn_frontend"
    paths = frozenset({"cudnn.sdpa_torch"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        max_head_dim=128,
        head_dim_multiple=8,
        head_dims_v=True,
        softcap=False,
        scale=False,
        window_convention="left: keys with the row itself counted; right: not counted; -1 for no bound",
        # Every pattern of strides is a plan of its own.
        memories=tuple(memory for memory in MEMORIES if memory != "mixed"),
        # It asserts on the device that the last prefix sum is the number of rows, which ends the CUDA context.
        capacity=False,
        repeatable_backward=False,
        covers_all_rows=False,
        graphs=None,
        compiles=True,
        compiled_first=CONFIGURATIONS,
        window_sizes=(7,),
        layouts=6,
    )
    # Every query head's dK and dV are stored before those of a group are added up: z up to 8.7 with grouped heads, 3.8
    # without.
    profile = Profile(expands_kv=True)

    call_source = """import cudnn


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    sums = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k)
    sums |= dict(max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_k)
    sides = dict(window_left=WINDOW[0] + 1 if WINDOW[0] >= 0 else -1, window_right=-1 if CAUSAL else WINDOW[1])
    masked = CAUSAL or WINDOW != (-1, -1)
    options = dict(scale=SCALE, is_causal=CAUSAL, causal_bottom_right=masked, return_lse=True)
    return cudnn.sdpa_torch(q, k, v, **sums, **sides, **options)[0]"""

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        if any(max((n for pair in call for n in pair), default=0) == 1 for call in calls):
            # It says so itself, in an error.
            return "calls whose documents have one query and one key at most"
        return None

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        if importlib.util.find_spec("cudnn") is None:
            return "the package nvidia-cudnn-frontend is not installed"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        import cudnn

        left, right = options.window
        masked = options.causal or left >= 0 or right >= 0
        out, lse = cudnn.sdpa_torch(
            q,
            k,
            v,
            scale=options.scale,
            is_causal=options.causal,
            causal_bottom_right=masked,
            window_left=left + 1 if left >= 0 else -1,
            window_right=-1 if options.causal else right,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_kv=metadata.cu_seqlens_k,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_kv=metadata.max_seqlen_k,
            return_lse=True,
        )
        return Attended(out, lse.detach().squeeze(-1).T, "cudnn.sdpa_torch")


KERNEL = CudnnFrontend()
