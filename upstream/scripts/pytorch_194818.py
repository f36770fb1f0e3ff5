"""pytorch#194818: varlen_attn takes rows that do not begin at multiples of 16 bytes, and faults or computes wrongly."""

import sys

import torch
from torch.nn.attention.varlen import varlen_attn

ROWS, HEADS, HEAD_DIM = 100, 2, 64
WIDTH = HEADS * HEAD_DIM
sums = torch.tensor([0, 37, ROWS], dtype=torch.int32, device="cuda")


def attend(tensors):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = varlen_attn(*tensors, sums, sums, 63, 63)
    found = torch.autograd.grad(out, tensors, torch.ones_like(out))
    torch.cuda.synchronize()
    return [out.detach(), *found]


def place(x, stride, start):
    """The same values in other memory: rows `stride` elements apart, from element `start`."""
    memory = torch.zeros(start + ROWS * stride, device="cuda", dtype=x.dtype)
    view = memory.as_strided(x.shape, (stride, HEAD_DIM, 1), start)
    return view.copy_(x)


values = [torch.randn(ROWS, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
expected = attend(values)
found = []
for name, stride, start in (("rows 2 bytes off", WIDTH + 1, 0), ("all 2 bytes off", WIDTH, 1)):
    try:
        got = attend([place(x, stride, start) for x in values])
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if "misaligned address" in said:
            found.append(f"{name}: {said}")
            break
        if "align" not in said:
            raise
        continue
    wrong = [label for label, a, b in zip(("out", "dq", "dk", "dv"), got, expected) if not (a - b).abs().max() < 0.05]
    if wrong:
        found.append(f"{name}: {', '.join(wrong)} wrong")
print("; ".join(found) or "unaligned tensors give what aligned ones give, or are refused")
sys.exit(bool(found))
