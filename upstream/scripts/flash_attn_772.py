"""Dao-AILab/flash-attention#772: slots of a cache that lie 2^30 elements apart are written to in the wrong place."""

import sys

import torch

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

SLOTS, ROWS, STRIDE = 5, 256, 2**30
# 8 GiB, of which only the head of every slot is used: K there, V a little behind it.
memory = torch.zeros((SLOTS - 1) * STRIDE + 2**21, device="cuda", dtype=torch.bfloat16)
k_cache, v_cache = (memory.as_strided((SLOTS, ROWS, 1, 64), (STRIDE, 64, 64, 1), start) for start in (0, 2**20))
slots = torch.arange(1, SLOTS, dtype=torch.int32, device="cuda")
empty = torch.zeros(SLOTS - 1, dtype=torch.int32, device="cuda")
found = []
for splits in (0, 1):
    memory.zero_()
    q, k, v = (torch.randn(SLOTS - 1, 3, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options = {"cache_seqlens": empty, "cache_batch_idx": slots, "num_splits": splits}
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, causal=True, **options)
    if k_cache[0].any() or v_cache[0].any():
        found.append(f"num_splits {splits}: slot 0 was written to")
    if not (torch.equal(k_cache[1:, :3], k) and torch.equal(v_cache[1:, :3], v)):
        found.append(f"num_splits {splits}: slots 1 to 4 do not hold what was appended")
print("; ".join(found) or "slots 1 to 4 hold what was appended, and slot 0 nothing")
sys.exit(bool(found))
