"""pytorch#190857: compiled FlexAttention's backward computes offsets into K and V in 32 bits."""

import sys

import torch
from torch.nn.attention.flex_attention import flex_attention

KEYS, HEAD_DIM, QUERIES = 24000, 128, 256
batch = 2**31 // (KEYS * HEAD_DIM) + 8


def make(rows):
    """Stored as [rows, batch, head_dim], so that a row is batch * head_dim elements from the next."""
    return torch.randn(rows, batch, HEAD_DIM, device="cuda", dtype=torch.bfloat16).permute(1, 0, 2)[:, None]


tensors = [make(rows).requires_grad_() for rows in (QUERIES, KEYS, KEYS)]
try:
    out = torch.compile(flex_attention, fullgraph=True)(*tensors)
    dk = torch.autograd.grad(out, tensors, torch.ones_like(out))[1]
    torch.cuda.synchronize()
except RuntimeError as error:
    print(str(error).splitlines()[0])
    sys.exit(1)
last = [x[-1:, :, :, :].detach().clone().requires_grad_() for x in tensors]
out = torch.nn.functional.scaled_dot_product_attention(*last)
expected = torch.autograd.grad(out, last, torch.ones_like(out))[1]
error = (dk[-1:] - expected).abs().max().item()
print(f"dK of the last batch element is off by {error:.2e}")
sys.exit(not error < 0.05)
