"""torch's scaled_dot_product_attention with an explicit mask, its unfused composition forced."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.kernels.sdpa_dense import SdpaDense, dense_attention
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.sdpa import as_softmax_does, only
from attn_fuzz.reference.case import FAR_MEMORIES, MEMORIES
from attn_fuzz.reference.profile import Profile


class ForcedDense(Kernel):
    """SDPA with an explicit mask and one of torch's kernels; subclasses name it."""

    forced: ClassVar[str]
    capabilities: ClassVar[Capabilities] = SdpaDense.capabilities
    profile: ClassVar[Profile] = SdpaDense.profile

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        with only(self.forced):
            return Attended(dense_attention(q, k, v, metadata, options), None, f"dense {self.forced}")


class SdpaDenseMath(ForcedDense):
    """Matrix products and a softmax, every step stored in the dtype."""

    name = "sdpa_dense_math"
    forced = "math"
    paths = frozenset({"dense math"})
    capabilities = dataclasses.replace(
        SdpaDense.capabilities,
        memories=MEMORIES,
        far_memories=FAR_MEMORIES,
        head_dims_v=True,
        queries_without_keys=True,
        repeatable_backward=True,
    )
    profile = Profile(
        scales_inputs=True,
        scales_gradients=True,
        rounds_scores=True,
        rounds_dp=True,
        delta_from_output=False,
        delta_from_probabilities=True,
        stores_probabilities=True,
        expands_kv=True,
    )

    def profile_on(self, device: str) -> Profile:
        return as_softmax_does(self.profile, device)


KERNEL = SdpaDenseMath()
