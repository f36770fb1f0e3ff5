"""Dao-AILab/flash-attention#2244: FlashAttention 3's deterministic backward gives other bits from run to run."""

import sys

import torch

try:
    from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func
except ImportError:
    print("flash-attn-3 is not installed")
    sys.exit(3)

RUNS = 30


def differing(deterministic, causal, head_dim, packed):
    """How many of RUNS backward passes over the same tensors differ from the first, for each gradient."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 2048, 3, 16, head_dim, device="cuda", dtype=torch.bfloat16)
    tensors = [qkv] if packed else [x.contiguous() for x in qkv.unbind(2)]
    tensors = [x.requires_grad_() for x in tensors]
    function = flash_attn_qkvpacked_func if packed else flash_attn_func
    counts = [0] * len(tensors)
    first = None
    for _ in range(RUNS):
        out = function(*tensors, causal=causal, deterministic=deterministic)
        out = out[0] if isinstance(out, tuple) else out
        torch.manual_seed(1)
        found = torch.autograd.grad(out, tensors, torch.randn_like(out))
        first = first or found
        counts = [n + (not torch.equal(a, b)) for n, a, b in zip(counts, found, first, strict=True)]
    return counts


found = []
for causal in (False, True):
    for head_dim in (64, 128):
        for packed in (False, True):
            if any(counts := differing(True, causal, head_dim, packed)):
                names = ("dqkv",) if packed else ("dq", "dk", "dv")
                seen = ", ".join(f"{name} {n}" for name, n in zip(names, counts, strict=True))
                found.append(f"head_dim {head_dim}, causal {causal}: {seen} of {RUNS} runs differ")
free = differing(False, False, 128, False)[0]
print("; ".join(found) or f"the same bits in {RUNS} runs each; without deterministic, dq of {free} runs differs")
sys.exit(bool(found))
