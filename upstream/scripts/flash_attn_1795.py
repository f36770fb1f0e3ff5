"""Dao-AILab/flash-attention#1795: a whole number for cache_seqlens is spread over blocks instead of the batch."""

import sys

import torch

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

blocks, size, batch = 2, 256, 4
q = torch.randn(batch, 1, 2, 64, device="cuda", dtype=torch.bfloat16)
k, v = (torch.randn(blocks, size, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
table = torch.zeros(batch, 1, dtype=torch.int32, device="cuda")
lengths = torch.full((batch,), 9, dtype=torch.int32, device="cuda")
expected = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)
try:
    got = flash_attn_with_kvcache(q, k, v, cache_seqlens=9, block_table=table)
except RuntimeError as error:
    print(f"raises: {str(error).splitlines()[0]}")
    sys.exit(1)
same = torch.equal(got, expected)
print("a whole number and a tensor give the same" if same else "a whole number gives another result than a tensor")
sys.exit(not same)
