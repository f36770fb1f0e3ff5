"""pytorch#177985, #142228, #146704: more than 65,535 heads or sequences are more than a kernel's grid takes."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

MANY = 65536 + 7
SHAPES = {"heads": (1, MANY, 10, 16), "sequences": (MANY, 1, 10, 16)}
# What the reports name, and what a refusal by torch itself says.
DEFECTS = ("CUDA error", "must match the size of tensor")
REFUSED = "No available kernel"


def attend(backend, tensors, mask, grad):
    wanted = [*tensors, mask] if mask is not None else tensors
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        found = torch.autograd.grad(out, wanted, grad)
    torch.cuda.synchronize()
    return [out.detach(), *found]


def compare(backend, shape, masked):
    """What is wrong with this call, if anything; the math kernel is the reference."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(4))
    mask = torch.randn(*shape[:3], shape[2], device="cuda", dtype=torch.float16) if masked else None
    tensors = [x.requires_grad_() for x in (q, k, v)]
    mask = mask.requires_grad_() if masked else None
    try:
        got = attend(backend, tensors, mask, grad)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if REFUSED in said:
            return None
        if not any(name in said for name in DEFECTS):
            raise
        return said[:70]
    expected = attend(SDPBackend.MATH, tensors, mask, grad)
    names = ("out", "dq", "dk", "dv", "dmask")
    wrong = [name for name, a, b in zip(names, got, expected) if not (a - b).abs().max() < 0.05]
    return f"{', '.join(wrong)} wrong" if wrong else None


found = []
for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION):
    for what, shape in SHAPES.items():
        for masked in (False, True):
            if masked and backend is SDPBackend.FLASH_ATTENTION:
                continue
            if wrong := compare(backend, shape, masked):
                found.append(f"{backend.name.split('_')[0].lower()}, {what}{', mask' * masked}: {wrong}")
            if wrong and "CUDA error" in wrong and "configuration" not in wrong:
                # Nothing runs in this process any more.
                print("; ".join(found))
                sys.exit(1)
print("; ".join(found) or f"{MANY} heads and sequences give what math gives, or are refused")
sys.exit(bool(found))
