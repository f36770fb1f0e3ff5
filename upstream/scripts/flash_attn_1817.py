"""Dao-AILab/flash-attention#1817: the LSE requires a gradient, and the one given to it is dropped without a word."""

import sys

import torch

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

torch.manual_seed(0)
q, k, v = (torch.randn(9, 2, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
sums = torch.tensor([0, 9], dtype=torch.int32, device="cuda")
lse = flash_attn_varlen_func(q, k, v, sums, sums, 9, 9, return_attn_probs=True)[1]
if not lse.requires_grad:
    print("the LSE is marked as without a gradient")
    sys.exit(0)
got = torch.autograd.grad(lse.sum(), (q, k))
queries, keys = (x.detach().double().requires_grad_() for x in (q, k))
exact = (torch.einsum("qhd,khd->hqk", queries, keys) * 64**-0.5).logsumexp(-1)
wanted = torch.autograd.grad(exact.sum(), (queries, keys))
told = [f"{name} is {x.float().norm():.3g}, {y.norm():.3g} is right" for name, x, y in zip(("dq", "dk"), got, wanted)]
print(f"of the sum of an LSE that requires a gradient the norm of {'; of '.join(told)}")
sys.exit(any((x.double() - y).norm() > 0.1 * y.norm() for x, y in zip(got, wanted, strict=True)))
