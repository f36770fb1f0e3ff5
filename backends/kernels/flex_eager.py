"""FlexAttention without compilation: torch's own reference of it, scores of the whole packed sequence."""

from __future__ import annotations

import torch

from attn_fuzz.backends.flex import flex
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import FAR_MEMORIES
from attn_fuzz.reference.profile import Profile


class FlexEager(Kernel):
    """``torch.nn.attention.flex_attention.flex_attention`` as it is; torch refuses its backward on CPU."""

    name = "flex_eager"
    paths = frozenset({"flex eager"})
    capabilities = Capabilities(
        devices=("cuda",),
        head_dims_v=True,
        capacity=False,
        isolates_nonfinite=False,
        repeatable_backward=False,
        far_memories=FAR_MEMORIES,
        graphs=None,
        lse_gradient=True,
    )
    profile = Profile(
        scales_gradients=True,
        rounds_scores=True,
        rounds_dp=True,
        stores_probabilities=True,
        expands_kv=True,
        normalises_by_lse=True,
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        import torch.nn.attention.flex_attention as module

        # Otherwise every new shape is traced again for nothing: what runs is the same.
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
        out, lse = flex(module.flex_attention, q, k, v, metadata, options)
        return Attended(out, lse, "flex eager")


KERNEL = FlexEager()
