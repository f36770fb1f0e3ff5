"""pytorch#135930, of padding on a GPU: offsets in nested tensors padded to more than 2^31 elements are of 32 bits."""

import sys

import torch

SIDE = 1 << 15
parts = [torch.full((rows, SIDE), value, device="cuda", dtype=torch.float16) for rows, value in ((SIDE, 1.0), (1, 2.0))]
parts.append(torch.full((1, SIDE), 3.0, device="cuda", dtype=torch.float16))
try:
    padded = torch.nested.to_padded_tensor(torch.nested.nested_tensor(parts), 0.0)
    last = padded[2, :2].float()
    seen = f"the third of three tensors padded to {SIDE} rows: {last[0, 0]:g}, then {last[1, 0]:g}; 3, then 0 is right"
    wrong = not (bool((last[0] == 3.0).all()) and bool((last[1] == 0.0).all()))
except RuntimeError as error:
    seen, wrong = str(error).splitlines()[0], True
print(seen)
sys.exit(wrong)
