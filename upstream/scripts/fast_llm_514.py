"""ServiceNow/Fast-LLM#514: rows before the first key prefix sum keep what memory held, in dK and dV."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

PAST, LENGTHS = 7, (4, 1, 10)
sums_q = torch.tensor([0, 4, 5, 15], dtype=torch.int32, device="cuda")
sums_k = torch.tensor([PAST, PAST + 4, PAST + 5, PAST + 15], dtype=torch.int32, device="cuda")


def nested(q, k, v):
    jagged = [
        torch.nested.nested_tensor_from_jagged(x, sums.long(), min_seqlen=1, max_seqlen=10).transpose(1, 2)
        for x, sums in ((q, sums_q), (k, sums_k), (v, sums_k))
    ]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(*jagged, is_causal=True).transpose(1, 2).values()


def efficient(q, k, v):
    batch = (x[None] for x in (q, k, v))
    return torch.ops.aten._efficient_attention_forward(*batch, None, sums_q, sums_k, 10, 10, 0.0, 2, True)[0][0]


def varlen(q, k, v):
    return varlen_attn(q, k, v, sums_q, sums_k, 10, 10, window_size=(-1, 0))


calls = {"jagged SDPA, efficient": nested, "aten efficient": efficient, "varlen_attn": varlen}
try:
    from flash_attn import flash_attn_varlen_func

    calls["flash-attn 2"] = lambda q, k, v: flash_attn_varlen_func(q, k, v, sums_q, sums_k, 10, 10, causal=True)
except ImportError:
    pass
dirty = []
for name, call in calls.items():
    free = [torch.full((size,), torch.nan, device="cuda") for size in (512, 4096, 1 << 20) for _ in range(64)]
    del free
    rows = (sum(LENGTHS), PAST + sum(LENGTHS), PAST + sum(LENGTHS))
    tensors = [torch.randn(n, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in rows]
    out = call(*tensors)
    _, dk, dv = torch.autograd.grad(out, tensors, torch.ones_like(out))
    if not bool((dk[:PAST] == 0).all() and (dv[:PAST] == 0).all()):
        dirty.append(name)
print(f"dK or dV before the first document is not zero: {', '.join(dirty)}" if dirty else "all zero")
sys.exit(bool(dirty))
