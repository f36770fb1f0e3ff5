"""pytorch#191937: memory-efficient forward is wrong for broadcast K and V of 32 n + 1 rows, with a mask."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attend(backend, *tensors, mask):
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)


found = []
for keys in (33, 34, 257, 258, 1025, 1026):
    for head_dim in (64, 256, 512):
        for queries in (1, keys):
            torch.manual_seed(0)
            q = torch.randn(1, 8, queries, head_dim, device="cuda", dtype=torch.bfloat16)
            k, v = (
                torch.randn(1, 1, keys, head_dim, device="cuda", dtype=torch.bfloat16).expand(1, 8, -1, -1)
                for _ in range(2)
            )
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)
            got = attend(SDPBackend.EFFICIENT_ATTENTION, q, k, v, mask=mask)
            expected = attend(SDPBackend.MATH, q.float(), k.float(), v.float(), mask=mask)
            error = (got.float() - expected).abs().max().item()
            if not error < 0.1:
                found.append(f"{queries} x {keys}, head_dim {head_dim}: off by {error:.3g}")
print("; ".join(found) or "right at 33, 257 and 1,025 keys, as at one more, with head_dim 64, 256 and 512")
sys.exit(bool(found))
