"""torch's scaled_dot_product_attention on jagged tensors, cuDNN forced."""

from __future__ import annotations

import dataclasses
import os

import torch

from attn_fuzz.backends.flash2 import ALIKE_MEMORIES
from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions
from attn_fuzz.backends.kernels.sdpa_nested_math import ForcedNested
from attn_fuzz.backends.kernels.torch_cudnn import CONFIGURATIONS, VALUE_DIMS
from attn_fuzz.backends.metadata import VarlenMetadata


class SdpaNestedCudnn(ForcedNested):
    """CuDNN over jagged tensors."""

    name = "sdpa_nested_cudnn"
    forced = "cudnn"
    paths = frozenset({"nested cudnn"})
    capabilities = dataclasses.replace(
        ForcedNested.capabilities,
        dtypes=HALF_DTYPES,
        head_dims=(64, 128),
        head_dims_v=VALUE_DIMS,
        empty_documents=True,
        memories=ALIKE_MEMORIES,
        scale=False,
        configurations=CONFIGURATIONS,
        layouts=8,
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        # Off by default in torch; read at the first call.
        os.environ.setdefault("TORCH_CUDNN_SDPA_NESTED_TENSOR_ENABLED", "1")
        return super().attend(q, k, v, metadata, options)


KERNEL = SdpaNestedCudnn()
