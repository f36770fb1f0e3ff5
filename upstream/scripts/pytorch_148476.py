"""pytorch#148476: only the mask requires a gradient, and the backward reads row sums that were never saved."""

import sys

import torch

q, k, v = (torch.randn(1, 1, 64, 16, device="cuda") for _ in range(3))
mask = torch.randn(1, 1, 64, 64, device="cuda", requires_grad=True)
try:
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    torch.cuda.synchronize()
except RuntimeError as error:
    print(str(error).splitlines()[0])
    sys.exit(1)
plain = mask.detach().requires_grad_()
(((q @ k.mT) / 4 + plain).softmax(-1) @ v).sum().backward()
error = (mask.grad - plain.grad).abs().max().item()
print(f"largest difference of the mask's gradient {error:.2e}")
sys.exit(error > 1e-3)
