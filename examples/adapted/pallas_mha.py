"""JAX's Pallas attention for GPUs: the pack as one sequence ``[1, t, h, d]``, a segment id for each token."""

import functools

from jax import default_backend
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

from attn_fuzz import adapters

SIZES = BlockSizes(block_q=64, block_k=64, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32)
attend = functools.partial(mha, block_sizes=SIZES, interpret=(on := default_backend()) == "cpu")
NAMES = {"ids": "segment_ids", "softmax_scale": "sm_scale"}
CAN = {"devices": (on.replace("gpu", "cuda"),), "gqa": False, "head_dims": (16, 64), "arithmetic": {"products": "tf32"}}
kernel = adapters.block_diagonal(adapters.from_jax(attend), names=NAMES, multiple=64, capabilities=CAN)
