"""pytorch#125674, #119320: memory-efficient backward gives NaN for large, finite float32 inputs, math does not."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

STEPS = 2000
plain = torch.nn.functional.scaled_dot_product_attention
last = {}


def watch(*arguments):
    """Stands between the layer and the kernel, and keeps what goes through."""
    out = plain(*arguments)
    last["arguments"] = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out.register_hook(lambda grad: last.update(grad=grad))
    return out


def unset(backend):
    """How many entries of dQ, dK and dV are not finite in the last call through this kernel; of the output, too."""
    tensors = [x.clone().requires_grad_() for x in last["arguments"][:3]]
    with sdpa_kernel(backend):
        out = plain(*tensors, *last["arguments"][3:])
        found = torch.autograd.grad(out, tensors, last["grad"])
    return sum(int((~x.isfinite()).sum()) for x in found), int((~out.isfinite()).sum())


torch.nn.functional.scaled_dot_product_attention = watch
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(1024, 16, dropout=0.01, batch_first=True).cuda()
optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
inputs = torch.full((50, 32, 1024), 1000.0, device="cuda")
step = 0
while step < STEPS:
    step += 1
    optimizer.zero_grad()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        layer(inputs).mean().backward()
    if not layer.self_attn.in_proj_weight.grad.isfinite().all():
        break
    optimizer.step()
else:
    print(f"all gradients are finite in {STEPS} steps")
    sys.exit(0)
large = max(x.abs().max().item() for x in last["arguments"][:3])
efficient, efficient_out = unset(SDPBackend.EFFICIENT_ATTENTION)
math, math_out = unset(SDPBackend.MATH)
print(
    f"step {step}, inputs up to {large:.3g}: {efficient} gradient entries not finite, {math} with math; "
    f"of the outputs {efficient_out} and {math_out}"
)
sys.exit(bool(efficient and not efficient_out and not math))
