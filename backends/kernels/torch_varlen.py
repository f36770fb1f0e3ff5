"""torch's own varlen attention (``torch.nn.attention.varlen``), a build of FlashAttention 2 inside torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES, FLASH2_PROFILE, flash2_limit
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities, Kernel, UnsupportedCase
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES, Case


@functools.cache
def _options() -> dict[str, Any]:
    """What is asked of every call: the LSE; of newer releases grouped heads, which older ones take as they are."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return {"return_aux": AuxRequest(lse=True), **grouped}


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What newer releases say where they have chosen cuDNN, which takes less, is a refusal.

    Raises:
        UnsupportedCase: with what was said.
    """
    try:
        yield
    except RuntimeError as error:
        if "cuDNN backend" in str(error):
            raise UnsupportedCase(f"torch has chosen cuDNN here: {error}") from error
        raise


class TorchVarlen(Kernel):
    """``varlen_attn``; causal is the window (left, 0), which it aligns bottom-right."""

    name = "torch_varlen"
    paths = frozenset({"varlen_attn"})
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=HALF_DTYPES,
        max_head_dim=256,
        head_dim_multiple=8,
        softcap=False,
        memories=(*ALIGNED_MEMORIES, "broadcast"),
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

    call_source = """from torch.nn.attention.varlen import varlen_attn


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    window = (WINDOW[0], 0) if CAUSAL else WINDOW
    sums = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    # Newer releases want enable_gqa=True for grouped heads.
    return varlen_attn(q, k, v, *sums, scale=SCALE, window_size=window)"""

    lse_source = call_source.replace("import varlen_attn", "import AuxRequest, varlen_attn").replace(
        "window_size=window)", "window_size=window, return_aux=AuxRequest(lse=True))"
    )

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        return flash2_limit(case, calls)

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "this torch has no torch.nn.attention.varlen"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        from torch.nn.attention.varlen import varlen_attn

        # [heads, tokens], whatever its documentation said before 2.14.
        with refusals():
            out, lse = varlen_attn(
                q,
                k,
                v,
                metadata.cu_seqlens_q,
                metadata.cu_seqlens_k,
                metadata.max_seqlen_q,
                metadata.max_seqlen_k,
                scale=options.scale,
                window_size=options.effective_window,
                **_options(),
            )
        return Attended(out, lse, "varlen_attn")


KERNEL = TorchVarlen()
