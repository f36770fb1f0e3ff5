"""facebookresearch/xformers#1122: a block-diagonal mask longer than K reads behind the tensor."""

import sys

import torch

try:
    from xformers import ops
except ImportError:
    print("xformers is not installed")
    sys.exit(3)

mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens([10], [20])
q = torch.randn(1, 10, 4, 8, device="cuda")
k, v = (torch.randn(1, 20, 4, 8, device="cuda") for _ in range(2))
sums = []
for rows in (1, 2, 10, 17, 20):
    try:
        sums.append(ops.memory_efficient_attention(q, k[:, :rows], v[:, :rows], attn_bias=mask.to("cuda")).sum().item())
    except (ValueError, RuntimeError) as error:
        print(f"refused at {rows} rows: {str(error).splitlines()[0]}")
        sys.exit(0)
print(f"sums over 1, 2, 10, 17 and 20 rows of K: {', '.join(f'{x:.4f}' for x in sums)}")
sys.exit(len(set(sums)) == 1)
