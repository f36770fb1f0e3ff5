"""Dao-AILab/flash-attention#2777: backward raises for inputs whose last dimension is not contiguous."""

import sys

import torch

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

sums = torch.tensor([0, 3, 8], dtype=torch.int32, device="cuda")
q = torch.randn(8, 64, 2, device="cuda", dtype=torch.bfloat16).transpose(-1, -2).requires_grad_()
k, v = (torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
out = flash_attn_varlen_func(q, k, v, sums, sums, 5, 5)
try:
    out.sum().backward()
except RuntimeError as error:
    print(str(error).splitlines()[0])
    sys.exit(1)
print("backward ran")
