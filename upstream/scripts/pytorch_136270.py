"""pytorch#136270: the backward of attention over narrowed nested tensors raises."""

import sys
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

warnings.simplefilter("ignore")
torch.manual_seed(0)
LENGTHS, PART = (5, 3, 7, 2), 2
whole = torch.nested.nested_tensor([torch.randn(n, 64, device="cuda") for n in LENGTHS])
layers = [torch.nn.Linear(64, 64, device="cuda") for _ in range(3)]


def heads(x):
    return x.reshape(x.size(0), -1, 4, 16).transpose(1, 2).contiguous()


def narrow(x):
    return torch.narrow(x, 0, 0, PART)


found = []
orders = {
    "narrowed heads": lambda layer: narrow(heads(layer(whole))),
    "heads of narrowed rows": lambda layer: heads(narrow(layer(whole))),
}
for name, make in orders.items():
    tensors = [make(layer) for layer in layers]
    where = "forward"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(*tensors)
        where = "backward"
        out.to_padded_tensor(0.0).sum().backward()
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not ("split_with_sizes" in said or "aten::narrow is not implemented" in said):
            raise
        found.append(f"{where} of {name}: {said[:90]}")
print("; ".join(found) or "the backward ran in both orders")
sys.exit(bool(found))
