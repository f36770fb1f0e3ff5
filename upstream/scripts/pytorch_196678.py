"""pytorch#196678: cuDNN's backward with a mask gives NaN in dQ where all scores of a row are far below zero."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def unset(backend, tokens, causal):
    """How many entries of dQ, dK and dV are not finite; scaled scores lie about -120."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for x, first in zip(tensors[:2], (1.0, -960.0), strict=True):
        x.mul_(0.1)[..., 0] = first
    tensors = [x.requires_grad_() for x in tensors]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="cuda")
    mask = mask.tril() if causal else mask
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        grads = torch.autograd.grad(out, tensors, torch.randn_like(out))
    assert out.isfinite().all(), "the forward is not finite"
    return {name: n for name, x in zip(("dq", "dk", "dv"), grads) if (n := int((~x.isfinite()).sum()))}


found = []
for tokens in (64, 640, 704, 768):
    for causal in (False, True):
        assert not unset(SDPBackend.EFFICIENT_ATTENTION, tokens, causal), "the other kernel is not finite either"
        for name, n in unset(SDPBackend.CUDNN_ATTENTION, tokens, causal).items():
            found.append(f"{tokens} tokens, {'causal' if causal else 'full'} mask: {n} entries of {name}")
print(f"not finite: {'; '.join(found)}" if found else "all gradients are finite at 64, 640, 704 and 768 tokens")
sys.exit(bool(found))
