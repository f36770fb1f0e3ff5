"""NVIDIA/cudnn-frontend#160, #1072: cuDNN's backward gives NaN without a mask where scores are far below zero."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def unset(backend, queries, keys, score):
    """How many entries of dQ, dK and dV are not finite."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for n in (queries, keys, keys)]
    for x, first in zip(tensors[:2], (1.0, 8.0 * score), strict=True):
        x.mul_(0.1)[..., 0] = first
    tensors = [x.requires_grad_() for x in tensors]
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*tensors)
        grads = torch.autograd.grad(out, tensors, torch.randn_like(out))
    assert out.isfinite().all(), "the forward is not finite"
    return {name: n for name, x in zip(("dq", "dk", "dv"), grads) if (n := int((~x.isfinite()).sum()))}


found, refused = [], []
for queries, keys in ((1, 97), (1, 128), (100, 100), (192, 192), (704, 704), (1000, 1000)):
    for score in (-128.0, -256.0):
        assert not unset(SDPBackend.EFFICIENT_ATTENTION, queries, keys, score), "the other kernel is not finite either"
        try:
            counts = unset(SDPBackend.CUDNN_ATTENTION, queries, keys, score)
        except RuntimeError as error:
            if "cuDNN Frontend error" not in str(error):
                raise
            refused.append(f"{queries} x {keys}")
            continue
        for name, n in counts.items():
            found.append(f"{queries} x {keys}, scores about {score:.0f}: {n} entries of {name}")
without = f"; refused: {', '.join(sorted(set(refused)))}" if refused else ""
print((f"not finite: {'; '.join(found)}" if found else "all gradients are finite") + without)
sys.exit(bool(found))
