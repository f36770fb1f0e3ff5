"""A layer with norms and rotary that needs torch only: what a script of a finding on it has to compute, too."""

from typing import ClassVar

import torch


def norm(x, weight):
    """RMS norm over head channels."""
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


class Layer:
    """Keys and values of earlier micro-sequences are leaves; their gradients wait for the step that made them."""

    capabilities: ClassVar = {
        "rotaries": ["default"],
        "shared_key_value": False,
        "window": False,
        "softcap": False,
        "noncausal": False,
        "dtypes": ["fp32"],
        "memories": ["contiguous"],
    }

    def __init__(self, weights, case):
        self.weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.case, self.scale = case, case.softmax_scale
        lengths = torch.tensor(case.packed_lengths)
        self.document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self.position = torch.cat([torch.arange(length) for length in case.packed_lengths])
        self.steps, self.gradients = [], dict.fromkeys(weights, 0.0)

    def rotated(self, x, position):
        pairs = x.shape[-1] // 2
        frequency = self.case.rotary_theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = (position[:, None] * frequency)[:, None]
        (a, b), cos, sin = x.chunk(2, -1), angle.cos().float(), angle.sin().float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x, begin, end):
        w, x = self.weights, x.detach().requires_grad_()
        position = self.position[begin:end]
        q = (x @ w["query"].T).unflatten(1, (self.case.heads, -1))
        k, v = (x @ w["key_value"].T).unflatten(1, (2 * self.case.kv_heads, -1)).chunk(2, 1)
        q, k, v = norm(q, w.get("query_norm")), norm(k, w.get("key_norm")), norm(v, w.get("value_norm"))
        own = torch.cat([self.rotated(k, position), v], 1)
        leaf = own.detach().requires_grad_()
        keys, values = torch.cat([*(step["leaf"] for step in self.steps), leaf]).chunk(2, 1)
        row, key = torch.arange(begin, end), torch.arange(end)
        mask = (self.document[begin:end, None] == self.document[:end]) & (key <= row[:, None])
        heads = (y.transpose(0, 1) for y in (self.rotated(q, position), keys, values))
        context = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=self.scale, enable_gqa=True)
        out = context.transpose(0, 1).flatten(1) @ w["dense"].T
        self.steps.append({"x": x, "own": own, "leaf": leaf, "out": out, "done": False})
        return out.detach()

    def backward(self, dout):
        step = [step for step in self.steps if not step["done"]][-1]
        step["out"].backward(dout)
        step["own"].backward(step["leaf"].grad)
        step["done"] = True
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.gradients[name] = self.gradients[name] + weight.grad
                weight.grad = None
        return step["x"].grad

    def parameter_gradients(self):
        return self.gradients

    def key_value(self):
        return None

    def key_value_gradients(self):
        return None
