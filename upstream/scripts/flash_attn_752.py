"""Dao-AILab/flash-attention#752: NaN gradients of packed q, k, v with rows behind the last prefix sum."""

import sys

import torch

try:
    from flash_attn import flash_attn_varlen_qkvpacked_func
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

free = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
del free
qkv = torch.randn(698, 3, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
sums = torch.tensor([0, 137, 486], dtype=torch.int32, device="cuda")
out = flash_attn_varlen_qkvpacked_func(qkv, sums, 2048)
out[:486].sum().backward()
unset = int((~qkv.grad.isfinite()).any(-1).any(-1).any(-1).sum())
print(f"{unset} rows of the gradient are not finite")
sys.exit(bool(unset))
