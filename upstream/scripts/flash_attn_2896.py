"""Dao-AILab/flash-attention#2896: FlashAttention 4's backward on Hopper is wrong for half of the head dimensions."""

import sys

import torch

try:
    from flash_attn.cute import flash_attn_varlen_func
except ImportError:
    print("flash-attn-4 is not installed")
    sys.exit(3)

ROWS = 200
wrong = []
for head_dim, heads, kv_heads in ((16, 2, 2), (16, 4, 2), (48, 2, 2), (72, 2, 2), (104, 2, 2)):
    torch.manual_seed(0)
    q, dout = (torch.randn(ROWS, heads, head_dim, device="cuda").bfloat16() for _ in range(2))
    k, v = (torch.randn(ROWS, kv_heads, head_dim, device="cuda").bfloat16() for _ in range(2))
    sums = torch.tensor([0, ROWS], dtype=torch.int32, device="cuda")
    lengths = {"cu_seqlens_q": sums, "cu_seqlens_k": sums, "max_seqlen_q": ROWS, "max_seqlen_k": ROWS}

    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    # Without a mask those of 104 channels are not even compiled.
    out = flash_attn_varlen_func(*mine, **lengths, causal=True)[0]
    found = torch.autograd.grad(out, mine, dout)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expanded = [exact[0], *(x.repeat_interleave(heads // kv_heads, 1) for x in exact[1:])]
    scores = torch.einsum("qhd,khd->hqk", *expanded[:2]) * head_dim**-0.5
    hidden = torch.ones(ROWS, ROWS, dtype=torch.bool, device="cuda").triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    wanted = torch.autograd.grad(torch.einsum("hqk,khd->qhd", weights, expanded[2]), exact, dout.double())

    for name, x, y in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        rows = ((x.double() - y).abs() > 0.05 + 0.05 * y.abs()).flatten(1).any(1)
        if rows.any():
            first, last = rows.nonzero()[[0, -1], 0].tolist()
            wrong.append(f"head_dim {head_dim}, heads {heads} over {kv_heads}: rows {first} to {last} of {name}")
print(f"of {ROWS} rows wrong: {'; '.join(wrong)}" if wrong else "all gradients are right")
sys.exit(bool(wrong))
