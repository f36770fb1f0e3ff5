"""pytorch#190758, #190717: compiled under a memory budget, the backward of attention draws another dropout mask."""

import sys

import torch
import torch._functorch.config
from torch.nn.attention import SDPBackend, sdpa_kernel


def kernel(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def spelled_out(q, k, v):
    return torch.nn.functional.dropout((q @ k.mT / 8).softmax(-1), 0.5) @ v


def gap(call, budget):
    """The output is linear in V, so <out, dout> = <v, dv> if forward and backward have one mask."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, 128, 64, device="cuda", requires_grad=True) for _ in range(3)]
    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    ):
        # What is recomputed is decided before Inductor: its graphs run as they are here.
        out = torch.compile(call, backend="aot_eager_decomp_partition")(*tensors)
        grad = torch.randn_like(out)
        dv = torch.autograd.grad(out, tensors, grad)[2]
    forward, backward = (out * grad).sum().item(), (tensors[2] * dv).sum().item()
    return abs(forward - backward) / (out.norm() * grad.norm()).item()


found = []
for call in (kernel, spelled_out):
    for budget in (1.0, 0.5, 0.0):
        error = gap(call, budget)
        if not error < 1e-4:
            assert budget < 1.0, f"{call.__name__}: the masks differ without a budget, too, by {error:.3g}"
            found.append(f"{call.__name__}, budget {budget}: {error:.2g}")
print(
    f"<out, dout> and <v, dv> differ by: {'; '.join(found)}"
    if found
    else "forward and backward have one dropout mask at budgets 1, 0.5 and 0"
)
sys.exit(bool(found))
