"""Dao-AILab/flash-attention#2424: FlashAttention 4 leaves mask_mod out of the backward."""

import sys

import torch

try:
    from cutlass import cute
    from flash_attn.cute import flash_attn_func
except ImportError:
    print("flash-attn-4 is not installed")
    sys.exit(3)

TOKENS = 256


@cute.jit
def mask(batch, head, row, key, lengths, tensors):
    return key <= row


torch.manual_seed(0)
tensors = [torch.randn(1, TOKENS, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
out = flash_attn_func(*tensors, mask_mod=mask)[0]
grad = torch.randn_like(out)
got = torch.autograd.grad(out, tensors, grad)
q, k, v = plain = [x.detach().float().requires_grad_() for x in tensors]
hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cuda").triu(1)
scores = torch.einsum("bihd,bjhd->bhij", q, k) * 128**-0.5
expected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
assert (out.float() - expected).abs().max() < 0.05, "the forward does not follow the mask"
errors = [
    (a.float() - b).abs().max().item()
    for a, b in zip(got, torch.autograd.grad(expected, plain, grad.float()), strict=True)
]
print(f"forward masked; dq, dk, dv off from the masked problem's by {', '.join(f'{error:.2g}' for error in errors)}")
sys.exit(not all(error < 0.1 for error in errors))
