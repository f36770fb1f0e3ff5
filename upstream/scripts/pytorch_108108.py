"""pytorch#108108: causal jagged attention is aligned otherwise in one kernel than in another."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sums_q, sums_k = (torch.tensor(sums, device="cuda") for sums in ([0, 2, 5], [0, 5, 8]))
q = torch.randn(5, 2, 64, device="cuda", dtype=torch.bfloat16)
k, v = (torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
jagged = [
    torch.nested.nested_tensor_from_jagged(x, sums, min_seqlen=2, max_seqlen=5).transpose(1, 2)
    for x, sums in ((q, sums_q), (k, sums_k), (v, sums_k))
]


def expected(shift):
    """The first document: query i sees keys up to i + shift."""
    scores = torch.einsum("ihd,jhd->hij", q[:2].float(), k[:5].float()) / 8
    mask = torch.arange(5, device="cuda") <= torch.arange(2, device="cuda")[:, None] + shift
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v[:5].float())


seen = {}
for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
    with sdpa_kernel(getattr(SDPBackend, name)):
        out = torch.nn.functional.scaled_dot_product_attention(*jagged, is_causal=True).transpose(1, 2).values()[:2]
    near = {
        where: (out - expected(shift)).abs().max().item() < 0.05
        for where, shift in (("top-left", 0), ("bottom-right", 3))
    }
    seen[name] = next((where for where, holds in near.items() if holds), "neither")
print(", ".join(f"{name}: {where}" for name, where in seen.items()))
sys.exit(len(set(seen.values())) > 1)
