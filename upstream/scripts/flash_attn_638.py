"""Dao-AILab/flash-attention#638: appending to a full cache writes behind it."""

import sys

import torch

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

whole_k, whole_v = (torch.zeros(2, 64, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
q, k, v = (torch.randn(1, 1, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
full = torch.full((1,), 64, dtype=torch.int32, device="cuda")
try:
    flash_attn_with_kvcache(q, whole_k[:1], whole_v[:1], k, v, cache_seqlens=full)
    torch.cuda.synchronize()
except RuntimeError as error:
    print(f"refused: {str(error).splitlines()[0]}")
    sys.exit(0)
written = bool((whole_k[1] != 0).any())
print("the row behind the cache was written" if written else "nothing behind the cache was written")
sys.exit(written)
