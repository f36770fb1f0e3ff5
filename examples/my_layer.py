"""A buffered attention layer to put under test: plain autograd, past keys and values kept as leaves."""

import torch


class Layer:
    """Keys and values of earlier micro-sequences are leaves; their gradients wait for the step that made them."""

    capabilities = {
        "norms": False,
        "rotaries": ["none"],
        "shared_key_value": False,
        "window": False,
        "softcap": False,
        "noncausal": False,
        "memories": ["contiguous"],
    }

    def __init__(self, weights, case):
        self.weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.heads, self.kv_heads, self.scale = case.heads, case.kv_heads, case.softmax_scale
        lengths = torch.tensor(case.packed_lengths)
        self.document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(weights["query"].device)
        self.steps, self.gradients = [], dict.fromkeys(weights, 0.0)

    def forward(self, x, begin, end):
        x = x.detach().requires_grad_()
        q = (x @ self.weights["query"].T).unflatten(1, (self.heads, -1))
        own = (x @ self.weights["key_value"].T).unflatten(1, (2 * self.kv_heads, -1))
        leaf = own.detach().requires_grad_()
        k, v = torch.cat([*(step["leaf"] for step in self.steps), leaf]).chunk(2, dim=1)
        row, key = torch.arange(begin, end, device=x.device), torch.arange(end, device=x.device)
        mask = (self.document[begin:end, None] == self.document[:end]) & (key <= row[:, None])
        heads = (y.transpose(0, 1) for y in (q, k, v))
        context = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=self.scale, enable_gqa=True)
        out = context.transpose(0, 1).flatten(1) @ self.weights["dense"].T
        self.steps.append({"x": x, "own": own, "leaf": leaf, "out": out, "done": False})
        return out.detach()

    def backward(self, dout):
        step = [step for step in self.steps if not step["done"]][-1]
        # First through the attention, which adds to the leaves of this step and of earlier ones ...
        step["out"].backward(dout)
        # ... then this step's keys and values, whose gradient is complete now, through their projection.
        step["own"].backward(step["leaf"].grad)
        step["done"] = True
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.gradients[name] = self.gradients[name] + weight.grad.float()
                weight.grad = None
        return step["x"].grad

    def parameter_gradients(self):
        return self.gradients

    def key_value(self):
        return None

    def key_value_gradients(self):
        return None
