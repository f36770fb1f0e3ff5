"""torch's scaled_dot_product_attention with its flash kernel forced: with a mask on CPU, by document on CUDA."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.kernel import HALF_DTYPES, Attended, AttentionOptions, Capabilities
from attn_fuzz.backends.kernels.sdpa_dense_math import ForcedDense
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.sdpa import as_flash_does, only
from attn_fuzz.reference.case import FAR_MEMORIES
from attn_fuzz.reference.profile import Profile


class SdpaDenseFlash(ForcedDense):
    """torch's flash attention: one of its own on CPU, which takes masks; FlashAttention 2 on CUDA, which takes none."""

    name = "sdpa_dense_flash"
    forced = "flash"
    paths = frozenset({"dense flash"})
    capabilities = dataclasses.replace(ForcedDense.capabilities, far_memories=FAR_MEMORIES)

    def paths_on(self, device: str) -> frozenset[str]:
        return frozenset({"flash by document"}) if device == "cuda" else self.paths

    def profile_on(self, device: str) -> Profile:
        return as_flash_does(self.profile, device)

    def capabilities_on(self, device: str) -> Capabilities:
        if device != "cuda":
            return self.capabilities
        return dataclasses.replace(
            self.capabilities,
            dtypes=HALF_DTYPES,
            max_head_dim=256,
            causal_needs_equal_lengths=True,
            window=False,
            isolates_nonfinite=True,
            # It goes by lengths that the host knows.
            graphs=False,
        )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        if q.device.type != "cuda":
            return super().attend(q, k, v, metadata, options)
        if (group := q.shape[1] // k.shape[1]) > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        pieces = zip(q.split(metadata.lengths_q), k.split(metadata.lengths_k), v.split(metadata.lengths_k), strict=True)
        outputs = []
        with only(self.forced):
            for document in pieces:
                query, key, value = (x.transpose(0, 1)[None] for x in document)
                if len(document[0]) == 0:
                    outputs.append(document[0])
                    continue
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=options.causal, scale=options.scale
                )
                outputs.append(out[0].transpose(0, 1))
        return Attended(torch.cat(outputs), None, "flash by document")


KERNEL = SdpaDenseFlash()
