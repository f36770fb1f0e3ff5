"""pytorch#186142: cuDNN's varlen backward takes head_dim for the longest document."""

import os
import sys

os.environ["TORCH_CUDNN_SDPA_NESTED_TENSOR_ENABLED"] = "1"

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

found = []
for tokens in (64, 65, 100):
    torch.manual_seed(0)
    tensors = [torch.randn(tokens, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    sums = torch.tensor([0, tokens], device="cuda")
    jagged = [
        torch.nested.nested_tensor_from_jagged(x, sums, min_seqlen=tokens, max_seqlen=tokens).transpose(1, 2)
        for x in tensors
    ]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*jagged, is_causal=True).transpose(1, 2).values()
    got = torch.autograd.grad(out, tensors, torch.ones_like(out))
    dense = [x.detach().float().transpose(0, 1)[None].requires_grad_() for x in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True)
    expected = torch.autograd.grad(plain, dense, torch.ones_like(plain))
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        error = (a.float() - b[0].transpose(0, 1)).abs().max().item()
        if not error < 0.1:
            found.append(f"{tokens} tokens: {name} off by {error:.3g}")
print("; ".join(found) or "gradients are right at 64, 65 and 100 tokens with head_dim 64")
sys.exit(bool(found))
