"""Dao-AILab/flash-attention#1915: FlashAttention 4's causal backward on Hopper masks by the wrong limits."""

import sys

import torch

try:
    from flash_attn.cute import flash_attn_func
except ImportError:
    print("flash-attn-4 is not installed")
    sys.exit(3)

found = []
for head_dim in (64, 128):
    for tokens in (128, 200, 1000, 1024):
        torch.manual_seed(0)
        tensors = [
            torch.randn(2, tokens, 4, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        out = flash_attn_func(*tensors, causal=True)[0]
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, tensors, grad)
        q, k, v = plain = [x.detach().float().requires_grad_() for x in tensors]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu(1)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * head_dim**-0.5
        expected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        expected = torch.autograd.grad(expected, plain, grad.float())
        for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
            error = (a.float() - b).abs().max().item()
            if not error < 0.1:
                found.append(f"head_dim {head_dim}, {tokens} tokens: {name} off by {error:.3g}")
print("; ".join(found) or "causal gradients are right at head_dim 64 and 128 with 128, 200, 1000 and 1024 tokens")
sys.exit(bool(found))
