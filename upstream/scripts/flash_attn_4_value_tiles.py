"""Dao-AILab/flash-attention#2087, of other channels: FlashAttention 4's backward on Hopper compiles some pairs only."""

import sys

import torch

try:
    from flash_attn.cute import flash_attn_varlen_func
except ImportError:
    print("flash-attn-4 is not installed")
    sys.exit(3)

ROWS = 9
sums = torch.tensor([0, ROWS], dtype=torch.int32, device="cuda")
lengths = {"cu_seqlens_q": sums, "cu_seqlens_k": sums, "max_seqlen_q": ROWS, "max_seqlen_k": ROWS}
wrong = []
for head_dim, head_dim_v in ((32, 64), (24, 40), (64, 32)):
    shapes = (head_dim, head_dim, head_dim_v)
    q, k, v = (torch.randn(ROWS, 1, dim, device="cuda").bfloat16().requires_grad_() for dim in shapes)
    out = flash_attn_varlen_func(q, k, v, **lengths)[0]
    try:
        torch.autograd.grad(out.sum(), (q, k, v))
    except Exception as error:
        wrong.append(f"{head_dim} beside {head_dim_v}: {type(error).__name__}: {str(error).splitlines()[0][:60]}")
print(f"no backward of {'; of '.join(wrong)}" if wrong else "every pair has a backward")
sys.exit(bool(wrong))
