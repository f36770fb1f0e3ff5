"""Dao-AILab/flash-attention#978: the row sum of a query without keys is +inf instead of -inf."""

import sys

import torch

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

q, k, v = (torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
sums_q = torch.tensor([0, 4, 8], dtype=torch.int32, device="cuda")
sums_k = torch.tensor([0, 0, 8], dtype=torch.int32, device="cuda")
_, lse, _ = flash_attn_varlen_func(q, k, v, sums_q, sums_k, 4, 8, return_attn_probs=True)
seen = sorted(set(lse[:, :4].flatten().tolist()))
print(f"row sums of the document without keys: {seen}")
sys.exit(seen != [float("-inf")])
