"""xformers' memory-efficient attention with block-diagonal masks."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.profile import Profile


@functools.cache
def _why_not_loaded(library: str) -> str | None:
    """Without its compiled library the package imports all the same, with a warning, and then refuses every call."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return f"the library of the package xformers does not load: {error}"
    return None


class Xformers(Kernel):
    """``xformers.ops.memory_efficient_attention`` over one packed batch element, its CUTLASS kernel chosen."""

    name = "xformers"
    paths = frozenset({"xformers cutlass"})
    capabilities = Capabilities(
        devices=("cuda",),
        head_dim_multiple=8,
        # Both of its operators say SUPPORTS_DIFFERENT_VALUE_EMBED.
        head_dims_v=True,
        # Grouped heads are a dimension of their own to it, and raise in the backward of block-diagonal masks.
        gqa=False,
        # Local masks have no backward in the CUTLASS kernel.
        window=False,
        softcap=False,
        queries_without_keys=False,
        memories=(*ALIGNED_MEMORIES, "broadcast"),
        # Of rows far apart the CUTLASS kernel has 32 bits for keys (limit-torch-efficient-far-rows).
        far_memories=("far_base",),
        repeatable_backward=False,
        covers_all_rows=False,
    )
    # The CUTLASS backward forms dS from P as its tiles keep it, in the storage dtype.
    profile = Profile(stores_probabilities=True)

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        if (spec := importlib.util.find_spec("xformers")) is None:
            return "the package xformers is not installed"
        return _why_not_loaded(str(Path(str(spec.origin)).with_name("_C.so")))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        # The file is named as the package, which absolute imports do not mind.
        from xformers import ops

        biases: Any = ops.fmha.attn_bias
        kind = biases.BlockDiagonalCausalFromBottomRightMask if options.causal else biases.BlockDiagonalMask
        bias = kind.from_seqlens(list(metadata.lengths_q), list(metadata.lengths_k), device=q.device)
        operators = ops.fmha.cutlass.FwOp, ops.fmha.cutlass.BwOp
        batch = (x[None] for x in (q, k, v))
        out = ops.memory_efficient_attention(*batch, attn_bias=bias, scale=options.scale, op=operators)[0]
        return Attended(out, None, "xformers cutlass")


KERNEL = Xformers()
