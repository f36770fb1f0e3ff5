"""pytorch#109517: memory-efficient attention gives NaN for masks that hold float32's lowest number."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, HEADS, TOKENS = 32, 12, 441
LOWEST = torch.finfo(torch.float32).min


def unset(backend, mask):
    """Which results are not finite."""
    torch.manual_seed(0)
    shape = (BATCH, HEADS, TOKENS, 64)
    tensors = [torch.randn(shape, device="cuda", requires_grad=True) for _ in range(3)]
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        grads = torch.autograd.grad(out, tensors, torch.randn_like(out))
    return {name for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads)) if not x.isfinite().all()}


found = []
for name, rows, keys in (("first 128 keys", slice(None), slice(128)), ("whole rows", slice(128), slice(None))):
    mask = torch.zeros(BATCH, HEADS, TOKENS, TOKENS, device="cuda")
    mask[:, :, rows, keys] = LOWEST
    assert not (also := unset(SDPBackend.MATH, mask)), f"{also} are not finite with math either, {name}"
    if seen := unset(SDPBackend.EFFICIENT_ATTENTION, mask):
        found.append(f"{name}: {', '.join(sorted(seen))}")
print(f"not finite: {'; '.join(found)}" if found else "all finite, with the first 128 keys masked and whole rows")
sys.exit(bool(found))
