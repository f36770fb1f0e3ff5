"""FlexAttention as it is meant to be used: compiled to a Triton kernel, half a minute for each configuration."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch

from attn_fuzz.backends.flex import FlexAttention, flex
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Configuration, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.profile import Profile

# The mask is data to the compiled kernel, so every kind of it belongs to each of these.
_SHAPES: Final = (("bf16", 64, 4, 2, 0.0), ("fp16", 32, 2, 2, 20.0), ("fp32", 16, 1, 1, 0.0))
_MASKS: Final = (
    (True, "none"),
    (True, "left"),
    (False, "none"),
    (False, "left"),
    (False, "right"),
    (False, "both"),
)
CONFIGURATIONS: Final = tuple(Configuration(*shape[:4], *mask, shape[4]) for shape in _SHAPES for mask in _MASKS)


@functools.cache
def _compiled() -> FlexAttention:
    from torch.nn.attention.flex_attention import flex_attention

    config: Any = torch._dynamo.config
    # One code object serves all configurations; the default would give up after eight.
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if hasattr(config, name):
            setattr(config, name, 1024)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


class FlexCompiled(Kernel):
    """``torch.compile(flex_attention)``, with dynamic shapes."""

    name = "flex_compiled"
    paths = frozenset({"flex compiled"})
    compiled = True
    capabilities = Capabilities(
        devices=("cuda",),
        # Below 16 it says that it does not; what is no power of two is padded.
        head_dims=(16, 32, 64, *(dim for dim in range(24, 129, 8) if dim not in (32, 64))),
        head_dims_v=True,
        scale=False,
        capacity=False,
        isolates_nonfinite=False,
        repeatable_backward=False,
        lse_gradient=True,
        compiles=True,
        compiled_first=CONFIGURATIONS,
        # Lengths are data to it, but totals of one token, or of up to one block of 128, are compiled apart.
        layouts=12,
        # So is every pattern of strides, ten seconds each; the eager one takes all of them.
        memories=("contiguous", "sliced"),
    )
    profile = Profile(tanh_error=2.0**-11)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        # Without it, calls of fewer than 128 queries compile a decoding kernel of their own.
        out, lse = flex(_compiled(), q, k, v, metadata, options, kernel_options={"FORCE_USE_FLEX_ATTENTION": True})
        return Attended(out, lse, "flex compiled")


KERNEL = FlexCompiled()
