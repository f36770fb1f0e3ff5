"""Kernels of other shapes as the varlen kernels that ``attn_fuzz.check`` takes; docs/adapters.md has examples.

Every adapter takes a function and gives a kernel, whose ``capabilities`` say what is true of the shape; what is given
as ``capabilities`` goes before them. Options (scale, causal, window, softcap) that the function has no parameter for
are not exercised; ``names`` says what it calls those that it has.
"""

from attn_fuzz.adapters.call import AdaptedKernel
from attn_fuzz.adapters.dense import block_diagonal, by_document, dense
from attn_fuzz.adapters.forward_only import forward_only
from attn_fuzz.adapters.from_jax import from_jax
from attn_fuzz.adapters.from_module import from_module
from attn_fuzz.adapters.lse import Lse
from attn_fuzz.adapters.varlen import packed_kv, packed_qkv, varlen

__all__ = [
    "AdaptedKernel",
    "Lse",
    "block_diagonal",
    "by_document",
    "dense",
    "forward_only",
    "from_jax",
    "from_module",
    "packed_kv",
    "packed_qkv",
    "varlen",
]
