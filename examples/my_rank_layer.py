"""A buffered attention layer over ranks that share each micro-sequence's tokens, to put under test.

Keys and values are gathered over the ranks, their gradients reduce-scattered; the rest each rank does for its own
tokens. The process group is torch.distributed's own, over gloo on CPUs.
"""

import torch
import torch.distributed as dist


class Layer:
    """Every rank keeps all keys and values, and the gradients that its own queries give them."""

    capabilities = {
        "ranks": True,
        "norms": False,
        "rotaries": ["none"],
        "shared_key_value": False,
        "window": False,
        "softcap": False,
        "noncausal": False,
        "memories": ["contiguous"],
    }

    def __init__(self, weights, case, group=None):
        self.group = group
        self.rank, self.ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.heads, self.scale = case.heads, case.softmax_scale
        device, lengths = weights["query"].device, torch.tensor(case.packed_lengths)
        self.document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        self.first_row = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).tolist()
        rows = (case.tokens + case.capacity, 2, case.kv_heads, case.head_dim)
        self.buffer = torch.empty(rows, dtype=weights["query"].dtype, device=device)
        self.gradient = torch.zeros(rows, device=device)
        self.steps, self.gradients = [], dict.fromkeys(weights, 0.0)

    def forward(self, x, begin, end):
        # This rank's tokens of the micro-sequence, and where the first of their documents begins.
        size = (end - begin) // self.ranks
        own = slice(begin + self.rank * size, begin + (self.rank + 1) * size)
        first = self.first_row[own.start]
        x = x.detach().requires_grad_()
        q = (x @ self.weights["query"].T).unflatten(1, (self.heads, -1))
        key_value = (x @ self.weights["key_value"].T).unflatten(1, (2, *self.buffer.shape[2:]))
        self.buffer[begin:end] = self.gathered(key_value.detach())
        leaf = self.buffer[first : own.stop].clone().requires_grad_()
        row, key = torch.arange(own.start, own.stop, device=x.device), torch.arange(first, own.stop, device=x.device)
        mask = (self.document[own, None] == self.document[first : own.stop]) & (key <= row[:, None])
        heads = (y.transpose(0, 1) for y in (q, *leaf.unbind(1)))
        context = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=self.scale, enable_gqa=True)
        out = context.transpose(0, 1).flatten(1) @ self.weights["dense"].T
        self.steps.append((x, key_value, leaf, out, (begin, end), (first, own)))
        return out.detach()

    def backward(self, dout):
        x, key_value, leaf, out, (begin, end), (first, own) = self.steps.pop()
        # Through the attention: gradients for all keys and values that this rank's queries attended to ...
        out.backward(dout)
        self.gradient[first : own.stop] += leaf.grad
        # ... of which those of the micro-sequence are complete now: each rank takes the sum of its own tokens' back.
        self.gradient[own] = self.reduced(self.gradient[begin:end])
        key_value.backward(self.gradient[own].to(key_value.dtype))
        for name, weight in self.weights.items():
            self.gradients[name] = self.gradients[name] + weight.grad.float()
            weight.grad = None
        return x.grad

    def gathered(self, own):
        """Every rank's rows, in the order of ranks, which is that of tokens."""
        if self.group is None:
            return own
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts)

    def reduced(self, rows):
        """Of rows of all ranks' tokens the sum over ranks of one's own, in float32."""
        if self.group is None:
            return rows
        parts = [part.contiguous() for part in rows.chunk(self.ranks)]
        own = torch.empty_like(parts[self.rank])
        dist.reduce_scatter(own, parts, group=self.group)
        return own

    def parameter_gradients(self):
        # Of this rank's tokens: who trains adds them up over the ranks.
        return self.gradients

    def key_value(self):
        return self.buffer[:, 0], self.buffer[:, 1]

    def key_value_gradients(self):
        return self.gradient[:, 0], self.gradient[:, 1]
