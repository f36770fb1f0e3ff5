"""pytorch#187227, for keys: memory-efficient forward finds those of a document by offsets of 32 bits from its first."""

import sys

import torch

TOKENS, HEADS, HEAD_DIM, STEP = 300, 2, 64, 9_600_000


def attention(q, k, v):
    sums = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    return torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, sums, sums, TOKENS, TOKENS, 0.0, 2, False
    )[0][0]


shape, width = (TOKENS, HEADS, HEAD_DIM), HEADS * HEAD_DIM
close = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
# q, k and v side by side, in rows so far apart that the last keys are more than 2^31 elements behind the first.
room = torch.zeros((TOKENS - 1) * STEP + 3 * width, device="cuda", dtype=torch.bfloat16)
far = [room.as_strided(shape, (STEP, HEAD_DIM, 1), place * width) for place in range(3)]
for x, values in zip(far, close, strict=True):
    x.copy_(values)
expected = attention(*close)
try:
    rows = (attention(*far) != expected).flatten(1).any(1).nonzero()[:, 0]
except RuntimeError as error:
    print(str(error).splitlines()[0])
    sys.exit(1)
told = f"{len(rows)} of {TOKENS} rows are other ones than with rows close together"
print(told if len(rows) else "the same output, wherever rows lie")
sys.exit(bool(len(rows)))
