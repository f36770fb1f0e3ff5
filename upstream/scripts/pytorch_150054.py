"""pytorch#150054, #147585: memory-efficient backward with a mask of more than 2^31 entries."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DEFECTS = ("illegal memory access", "overflows")


def gradients(tensors, grad, backend, **options):
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, **options)
        return torch.autograd.grad(out, tensors, grad)


found = []
for tokens, heads, head_dim in ((46336, 1, 128), (49999, 2, 64), (53936, 1, 128)):
    torch.manual_seed(0)
    shape = (1, heads, tokens, head_dim)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    expected = gradients(tensors, grad, SDPBackend.FLASH_ATTENTION, is_causal=True)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril_()
    try:
        got = gradients(tensors, grad, SDPBackend.EFFICIENT_ATTENTION, attn_mask=mask)
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not any(name in said for name in DEFECTS):
            raise
        print("; ".join([*found, f"{tokens} tokens: {said}"]))
        sys.exit(1)
    del mask
    torch.cuda.empty_cache()
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        size = b.float().norm(dim=-1)
        good = (a - b).float().norm(dim=-1) < 0.5 * size.clamp_min(0.2 * size.median().item())
        rows = (~good)[0].any(0).nonzero()[:, 0]
        if len(rows):
            found.append(f"{tokens} tokens: {name} is wrong in {len(rows)} rows from {int(rows[0])}")
print("; ".join(found) or "gradients with a causal mask are those of the causal flash kernel up to 53,936 tokens")
sys.exit(bool(found))
