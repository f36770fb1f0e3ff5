"""Dao-AILab/flash-attention#2711: with lengths beyond its pages, a block table is followed behind its end."""

import sys

import torch

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    print("flash-attn is not installed")
    sys.exit(3)

# 25 sequences of 4 heads and 14 blocks of keys: by default 5 splits of 3 blocks, one block more than there are.
BATCH, HEADS, PAGES, PAGE = 25, 4, 7, 256


def tensors(rows):
    return torch.randn(BATCH, rows, HEADS, 128, device="cuda", dtype=torch.bfloat16)


def pool():
    """Page 0, which the table names, is 0 in V; page 1, which only the entry behind the table names, is 1."""
    k = torch.randn(2, PAGE, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    v[1] = 1
    return k, v


wide = torch.zeros(BATCH, PAGES + 1, dtype=torch.int32, device="cuda")
wide[:, PAGES] = 1
table = wide[:, :PAGES]
full = torch.full((BATCH,), PAGES * PAGE, dtype=torch.int32, device="cuda")
found = []
try:
    for splits in (0, 1, 5):
        k, v = pool()
        within = flash_attn_with_kvcache(tensors(1), k, v, cache_seqlens=full, block_table=table, num_splits=splits)
        assert not within.any(), "page 1 is in use where it should not be"
        out = flash_attn_with_kvcache(tensors(1), k, v, cache_seqlens=full + 128, block_table=table, num_splits=splits)
        if out.any():
            found.append(f"num_splits {splits}: attends to a page behind the table")
        k, v = pool()
        before = k[1].clone()
        new = (tensors(1), tensors(1))
        flash_attn_with_kvcache(tensors(1), k, v, *new, cache_seqlens=full, block_table=table, num_splits=splits)
        if not torch.equal(k[1], before):
            found.append(f"num_splits {splits}: appends to a page behind the table")
except RuntimeError as error:
    if "block_table" not in str(error):
        raise
    print(f"refused: {str(error).splitlines()[0]}")
    sys.exit(0)
print("; ".join(found) or "nothing behind the table is read or written")
sys.exit(bool(found))
