"""pytorch#187227, #162588: memory-efficient forward with a mask of more than 2^32 entries reads the wrong mask rows."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

wrong = []
for tokens in (65536, 65537, 73728):
    q, k, v = (torch.randn(1, 1, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril_()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = ((masked - causal).abs().amax(-1)[0, 0] > 0.1).nonzero()[:, 0]
    if len(rows):
        wrong.append(f"{tokens} tokens: {len(rows)} rows from {int(rows[0])} (2^32 // tokens = {2**32 // tokens})")
    del q, k, v, mask, masked, causal
    torch.cuda.empty_cache()
print("; ".join(wrong) or "masked and causal agree at 65,536, 65,537 and 73,728 tokens")
sys.exit(bool(wrong))
