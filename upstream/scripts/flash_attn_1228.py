"""Dao-AILab/flash-attention#1228, #1661: rows behind the last prefix sum stay unwritten, forward and backward."""

import sys

import torch

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

free = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
del free
q, k, v = (torch.randn(946, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
sums = torch.tensor([0, 144, 432, 944], dtype=torch.int32, device="cuda")
out = flash_attn_varlen_func(q, k, v, sums, sums, 512, 512)
found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
tails = {"out": out, **dict(zip(("dq", "dk", "dv"), found, strict=True))}
dirty = [name for name, x in tails.items() if not bool((x[944:] == 0).all())]
print(f"rows 944 and 945 are not zero in {', '.join(dirty)}" if dirty else "rows 944 and 945 are zero everywhere")
sys.exit(bool(dirty))
