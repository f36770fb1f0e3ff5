"""CPU stand-in for the flash kernels: one document after another, unwritten rows left as they are."""

from __future__ import annotations

import torch

from attn_fuzz.backends.crowd import Crowd
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.loop import attend
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES
from attn_fuzz.reference.profile import Profile


class LoopKernel(Kernel):
    """Runs on any device, but one document at a time."""

    name = "loop"
    paths = frozenset({"loop"})
    capabilities = Capabilities(
        covers_all_rows=False,
        lse_gradient=True,
        head_dims_v=True,
        loose_max_seqlen=True,
        crowds=True,
        gaps=("q", "k"),
        far_memories=FAR_MEMORIES,
        placement_keeps_bits=("max_seqlen",),
    )
    profile = Profile(normalises_by_lse=True)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        out, lse = attend(Crowd(), q, k, v, metadata, options)
        return Attended(out, lse, "loop")


KERNEL = LoopKernel()
