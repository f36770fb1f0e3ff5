"""A layer as users write them, over sequence-data-parallel and tensor-parallel ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist


def gathered(own: torch.Tensor, group: Any) -> torch.Tensor:
    """Rows of all ranks of a group."""
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts)


def summed(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the ranks of a group of one's own rows, in float32."""
    parts = [part.float().contiguous() for part in rows.chunk(group.size())]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own


class Layer:
    """One K/V head, whose keys and values are made by all; neighbours share the query heads of a slice."""

    capabilities: ClassVar[dict[str, Any]] = {
        "ranks": [1, 2],
        "tensor_ranks": [2],
        "norms": False,
        "rotaries": ["none"],
        "shared_key_value": False,
        "window": False,
        "softcap": False,
        "noncausal": False,
        "memories": ["contiguous"],
    }

    def __init__(self, weights: dict[str, torch.Tensor], case: Any, *, group: Any, tensor_group: Any) -> None:
        self.group, self.neighbours, self.case = group, tensor_group, case
        width = case.heads // tensor_group.size() * case.head_dim
        mine = slice(tensor_group.rank() * width, (tensor_group.rank() + 1) * width)
        shares = {**weights, "query": weights["query"][mine], "dense": weights["dense"][:, mine]}
        self.weights = {name: weight.detach().clone().requires_grad_() for name, weight in shares.items()}
        lengths = torch.tensor(case.packed_lengths)
        self.document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self.past: list[torch.Tensor] = []
        self.gradient = torch.zeros(case.tokens, 2, 1, case.head_dim)
        self.steps: list[Any] = []
        self.gradients = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in self.weights.items()}

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        ranks, shared = self.group.size(), self.neighbours.size()
        size = (end - begin) // ranks
        own = slice(begin + self.group.rank() * size, begin + (self.group.rank() + 1) * size)
        first = begin + self.group.rank() // shared * shared * size
        block = slice(first, first + shared * size)
        x = x.detach().requires_grad_()
        of_block = gathered(x.detach(), self.neighbours).requires_grad_()
        q = (of_block @ self.weights["query"].T).unflatten(1, (self.case.heads // shared, -1))
        key_value = (x @ self.weights["key_value"].T).unflatten(1, (2, 1, -1))
        self.past.append(gathered(key_value.detach(), self.group))
        leaf = torch.cat(self.past)[: block.stop].requires_grad_()
        row, key = torch.arange(block.start, block.stop), torch.arange(block.stop)
        mask = (self.document[block, None] == self.document[: block.stop]) & (key <= row[:, None])
        heads = (y.transpose(0, 1) for y in (q, *leaf.unbind(1)))
        scale = self.case.softmax_scale
        context = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True)
        partial = context.transpose(0, 1).flatten(1) @ self.weights["dense"].T
        self.steps.append((x, of_block, key_value, leaf, partial, (begin, end), own))
        return summed(partial.detach(), self.neighbours).to(x.dtype)

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        x, of_block, key_value, leaf, partial, (begin, end), own = self.steps.pop()
        partial.backward(gathered(dout, self.neighbours))
        self.gradient[: len(leaf)] += leaf.grad
        self.gradient[own] = summed(self.gradient[begin:end], self.group)
        key_value.backward(self.gradient[own].to(key_value.dtype))
        for name, weight in self.weights.items():
            self.gradients[name] += weight.grad.float()  # type: ignore[union-attr]
            weight.grad = None
        through_queries = summed(of_block.grad, self.neighbours).to(x.dtype)
        return through_queries + x.grad

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        return self.gradients

    def key_value(self) -> None:
        return None

    def key_value_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gradient[:, 0], self.gradient[:, 1]
