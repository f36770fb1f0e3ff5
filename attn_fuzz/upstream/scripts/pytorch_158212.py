"""pytorch#158212: compiled FlexAttention and a mask of three segments; a mask of that kind, not the reported one."""

import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

T, W = 1024, 4


def make(offset):
    def mask(batch, head, row, key):
        first, second = row < T, (row >= T) & (row < 2 * T)
        block = torch.div(row - offset - T, W, rounding_mode="floor")
        own = torch.div(key - offset - T, W, rounding_mode="floor")
        apart = (row - T) % W != offset
        return (
            (first & (key < T) & (row > key - W))
            | (second & (key < T) & apart & (key <= block * W + offset))
            | (second & (key >= T) & (key < 2 * T) & (block == own) & apart & ((key - T) % W != offset))
            | ((row >= 2 * T) & (key >= 2 * T) & (row >= key))
        )

    return mask


compiled = torch.compile(flex_attention)
found = []
for offset in (W - 1, W):
    blocks = create_block_mask(make(offset), None, None, 3 * T, 3 * T, device="cuda")
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 3 * T, 64, device="cuda", requires_grad=True) for _ in range(3)]
    dense = make(offset)(0, 0, torch.arange(3 * T, device="cuda")[:, None], torch.arange(3 * T, device="cuda")[None])
    scores = (tensors[0] @ tensors[1].mT / 8).masked_fill(~dense, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    expected = torch.autograd.grad((weights @ tensors[2]).sum(), tensors)
    got = torch.autograd.grad(compiled(*tensors, block_mask=blocks).sum(), tensors)
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        error = (a - b).abs().max().item()
        if not error < 0.05:
            found.append(f"offset {offset}: {name} off by {error:.3g}")
print("; ".join(found) or f"compiled and plain gradients agree for offsets {W - 1} and {W}")
sys.exit(bool(found))
