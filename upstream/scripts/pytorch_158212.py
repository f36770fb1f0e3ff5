"""pytorch#158212: compiled FlexAttention divides negative indices of a mask wrongly; its dK and dV are of another."""

import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# The reported numbers. They stay constants of the compiled code: as arguments of a closure they would be compiled as
# symbols the second time, of which Triton does not know what divides them, and there is nothing to see.
T, W, OFFSET = 1024, 4, 4


def reported(batch, head, row, key):
    """Three segments: a prefix, rows that see it in strides and their own block, and a copy that has their blocks."""
    second = (row >= T) & (row < 2 * T) & ((row - T) % W != OFFSET)
    block = (row - OFFSET - T) // W
    own = (key >= T) & (key < 2 * T) & ((key - T) % W != OFFSET) & (block == (key - OFFSET - T) // W)
    copy = (key >= 2 * T) & (block == (key - OFFSET - 2 * T) // W)
    third = (row >= 2 * T) & (key >= 2 * T) & ((row - OFFSET - 2 * T) // W == (key - OFFSET - 2 * T) // W)
    prefix = (key < T) & (key <= block * W + OFFSET)
    return ((row < T) & (key < T) & (row > key - W)) | (second & (prefix | own | copy)) | third


def divided(batch, head, row, key):
    """Only the division."""
    return (row - OFFSET - T) // W == (key - OFFSET - T) // W


def wrong(mask, dtype):
    """Rows of the output and of the gradients that are not those of the mask as eager torch reads it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 3 * T, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    blocks = create_block_mask(mask, None, None, 3 * T, 3 * T, device="cuda")
    out = torch.compile(flex_attention, dynamic=False)(*tensors, block_mask=blocks)
    grad = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, tensors, grad))
    index = torch.arange(3 * T, device="cuda")
    seen = mask(0, 0, index[:, None], index[None])
    q, k, v = plain = [x.detach().float().requires_grad_() for x in tensors]
    out = (q @ k.mT / 8).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    expected = (out, *torch.autograd.grad(out, plain, grad.float()))
    counts = {}
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        size = b.norm(dim=-1)
        good = (a.float() - b).norm(dim=-1) < 0.25 * size.clamp_min(0.25 * size.median().item())
        counts[name] = int((~good).sum())
    return {name: n for name, n in counts.items() if n}


found = []
for mask in (reported, divided):
    for dtype in (torch.float32, torch.bfloat16):
        if counts := wrong(mask, dtype):
            rows = ", ".join(f"{n} rows of {name}" for name, n in counts.items())
            found.append(f"{mask.__name__} mask, {str(dtype)[6:]}: {rows}")
print(
    f"wrong: {'; '.join(found)}" if found else "compiled and plain results agree for both masks in float32 and bfloat16"
)
sys.exit(bool(found))
