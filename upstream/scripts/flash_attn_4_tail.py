"""Dao-AILab/flash-attention#1228 in FlashAttention 4: rows behind the last prefix sum stay unwritten."""

import sys

import torch

try:
    from flash_attn.cute import flash_attn_varlen_func
except ImportError:
    print("flash-attn-4 is not installed")
    sys.exit(3)

free = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
del free
q, k, v = (torch.randn(946, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
sums = torch.tensor([0, 144, 432, 944], dtype=torch.int32, device="cuda")
lengths = {"cu_seqlens_q": sums, "cu_seqlens_k": sums, "max_seqlen_q": 512, "max_seqlen_k": 512}
out = flash_attn_varlen_func(q, k, v, **lengths)[0]
found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
tails = {"out": out, **dict(zip(("dq", "dk", "dv"), found, strict=True))}
dirty = [name for name, x in tails.items() if not bool((x[944:] == 0).all())]
print(f"rows 944 and 945 are not zero in {', '.join(dirty)}" if dirty else "rows 944 and 945 are zero everywhere")
sys.exit(bool(dirty))
