"""torch's scaled_dot_product_attention on jagged tensors, its unfused composition forced."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Final

import torch

from attn_fuzz.backends.flash2 import ALIGNED_MEMORIES
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.kernels.sdpa_nested import UNFUSED, SdpaNested, nested_attention
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.sdpa import only
from attn_fuzz.reference.case import MEMORIES, Case
from attn_fuzz.reference.profile import Profile


class ForcedNested(Kernel):
    """SDPA on jagged tensors with one of torch's kernels; subclasses name it.

    Causal jagged attention is bottom-right in the flash kernel and top-left in others, which therefore take documents
    of as many queries as keys.
    """

    forced: ClassVar[str]
    capabilities: ClassVar[Capabilities] = dataclasses.replace(
        SdpaNested.capabilities,
        devices=("cuda",),
        head_dim_multiple=8,
        causal_needs_equal_lengths=True,
        memories=(*ALIGNED_MEMORIES, "strided"),
    )
    profile: ClassVar[Profile] = SdpaNested.profile

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        with only(self.forced):
            out = nested_attention(q, k, v, metadata, options, fused=self.forced != "math")
        return Attended(out, None, f"nested {self.forced}")


_MOST_PADDED: Final = 1 << 31
"""Scores of all documents, each padded to the longest, as torch's products have them under autograd: on CUDA offsets in
the padded tensor are of 32 bits."""


class SdpaNestedMath(ForcedNested):
    """Matrix products and a softmax, every step stored in the dtype. It has no causal mask for jagged tensors."""

    name = "sdpa_nested_math"
    forced = "math"
    paths = frozenset({"nested math"})
    capabilities = dataclasses.replace(
        ForcedNested.capabilities,
        devices=("cpu", "cuda"),
        head_dim_multiple=1,
        causal=False,
        # Documents without keys are right beside others; a call in which no document has one raises.
        queries_without_keys=False,
        empty_documents=True,
        memories=MEMORIES,
    )
    profile = UNFUSED

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        for call in calls:
            queries, keys = (max((pair[side] for pair in call), default=0) for side in (0, 1))
            if len(call) * case.heads * queries * keys > _MOST_PADDED:
                return f"more than {_MOST_PADDED:,} scores of documents that are all padded to the longest"
        return None

    def profile_on(self, device: str) -> Profile:
        # The backward of torch's softmax on CUDA begins with P * dP, a tensor of its own.
        return dataclasses.replace(self.profile, stores_products=device == "cuda")


KERNEL = SdpaNestedMath()
