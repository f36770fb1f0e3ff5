"""A kernel and a layer as users write them, with all that torch lets them do around its allocations.

Nothing here is for the harness: it is what frameworks' attention modules do, in one place.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Tagged(torch.Tensor):
    """A subclass without storage of another kind, as quantising and sharding frameworks have."""


class Parameter(torch.nn.Parameter):
    """A parameter subclass, made below ``torch.nn.Parameter``'s own constructor."""

    def __new__(cls, data: torch.Tensor) -> Parameter:
        return torch.Tensor._make_subclass(cls, data, True)


class Wrapper(torch.Tensor):
    """A tensor that holds another one and computes with it."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, func(*args, **kwargs))


class CountsOperations(TorchDispatchMode):
    """Sees every operation below autograd, as profilers and activation checkpointing do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class SeesEmpty(TorchFunctionMode):
    """Knows ``torch.empty`` by identity, as meta initialisation and device contexts do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func in (torch.empty, torch.empty_like)
        return func(*args, **(kwargs or {}))


@torch.library.custom_op("attn_fuzz_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x)
    result.copy_(x)
    return result * 2


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _written(x: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x)
    return result.copy_(x)


def _allocates(x: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x)
    return result.copy_(x) + torch.empty(x.shape, dtype=x.dtype, device=x.device).fill_(0)


_compiled = [torch.compile(_allocates, fullgraph=True, backend=backend) for backend in ("eager", "aot_eager")]


def _subclasses(x: torch.Tensor) -> None:
    data = torch.empty_like(x).copy_(x)
    for made in (
        torch.Tensor.__new__(Tagged, data),
        torch.Tensor.__new__(Tagged, torch.empty_like(x)),
        torch.Tensor._make_subclass(Tagged, data),
        torch.empty_like(x).as_subclass(Tagged),
        torch.nn.Parameter(torch.Tensor.__new__(Tagged, torch.empty_like(x))),
        Parameter(torch.empty_like(x)),
    ):
        assert made.shape == x.shape
    # These allocate on the CPU, and become the subclass where they are.
    assert torch.Tensor.__new__(Tagged, 2, 3).shape == Tagged(2, 3).shape == (2, 3)
    assert Tagged([1.0, 2.0]).tolist() == [1.0, 2.0]
    assert torch.equal((Wrapper(data) * 2).inner, data * 2)
    assert isinstance(torch.empty_like(Wrapper(data)), Wrapper)


def _modes(x: torch.Tensor) -> None:
    with SeesEmpty() as calls, CountsOperations() as operations:
        torch.empty(3, device=x.device)
        torch.empty_like(x)
        x.new_empty(2)
    assert calls.seen == 2
    assert operations.seen[0] is torch.ops.aten.empty.memory_format
    assert len(operations.seen) == 3
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.zeros(2).is_meta
    with torch.device(x.device):
        assert torch.empty(2).device.type == x.device.type
    torch.set_default_device(x.device)
    try:
        assert torch.empty(2, dtype=torch.int64).device.type == x.device.type
    finally:
        torch.set_default_device(None)


def _squared(x: torch.Tensor) -> torch.Tensor:
    return (torch.empty_like(x).copy_(x.detach()) * x).sum()


def _transforms(x: torch.Tensor) -> None:
    assert torch.equal(torch.vmap(_written)(x), x)
    assert torch.equal(torch.func.vmap(torch.func.grad(_squared))(x), x)
    assert torch.equal(doubled(x), x * 2)
    for compiled in _compiled:
        assert torch.equal(compiled(x), x)


def _settings(x: torch.Tensor) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = torch.empty_like(x)
        assert torch.empty(x.shape, out=given) is given
        torch.empty(0, device=x.device)
        torch.empty(x.shape, dtype=torch.bool, device=x.device).fill_(True)
    with torch.inference_mode():
        assert torch.empty_like(x).is_inference()
    with torch.no_grad():
        assert not torch.empty_like(x).requires_grad
    print("a kernel that prints")


def everything(x: torch.Tensor) -> None:
    """All of it, beside the computation."""
    with torch.no_grad():
        sample = torch.arange(12).to(x).view(3, 4)
        _subclasses(sample)
        _modes(sample)
        _transforms(sample)
        _settings(sample)


@contextlib.contextmanager
def _packing() -> Iterator[None]:
    """Saved tensors go to another place and come back, as offloading does."""

    def pack(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


class _Attention(torch.autograd.Function):
    """One document; does everything in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: Any) -> torch.Tensor:
        everything(q)
        with torch.enable_grad(), _packing():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            heads = [x.transpose(0, 1).float() for x in leaves]
            group = len(heads[0]) // len(heads[1])
            keys, values = (x.repeat_interleave(group, 0) for x in heads[1:])
            scores = (heads[0] @ keys.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
            out = (scores.softmax(-1).nan_to_num(0.0) @ values).transpose(0, 1).to(q.dtype)
        ctx.leaves, ctx.out = leaves, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        everything(dout)
        return (*torch.autograd.grad(ctx.out, ctx.leaves, dout, retain_graph=True), None, None)


def _causal(queries: int, keys: int, causal: bool, device: torch.device) -> torch.Tensor:
    row, key = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    return (key <= row + keys - queries) if causal else (key >= 0).expand(queries, keys)


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """Document by document, into memory that it allocates."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = []
    for index in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[index : index + 2]), slice(*ends_k[index : index + 2])
        mask = _causal(rows.stop - rows.start, keys.stop - keys.start, causal, q.device)
        parts.append(_Attention.apply(q[rows], k[keys], v[keys], softmax_scale, mask))
    return torch.cat(parts)


class _Unwritten(torch.autograd.Function):
    """Copies all rows but the last."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(x)
        result[:-1] = x[:-1]
        return result

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        return dout


def forgets_a_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """The same with one row that is not written."""
    whole = kernel(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale, causal=causal
    )
    return _Unwritten.apply(whole)


class _Projections(torch.nn.Module):
    """Lives as long as the process, and its gradients with it: each is written again, where it is, by the next run."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            parameter = Parameter(torch.empty_like(weight))
            parameter.grad = torch.zeros_like(weight)
            self.register_parameter(name, parameter)

    def begin(self, weights: dict[str, torch.Tensor]) -> None:
        """Other weights, and gradients back to zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[name])
                parameter.grad.zero_()  # type: ignore[union-attr]


_free: dict[Any, _Projections] = {}
"""Modules that no sequence in flight uses, by the kind of their weights."""


class Layer:
    """A layer around a module that persists, and hands the gradients of its parameters out live."""

    capabilities: ClassVar[dict[str, Any]] = {
        "norms": False,
        "rotaries": ["none"],
        "shared_key_value": False,
        "window": False,
        "softcap": False,
        "noncausal": False,
        "memories": ["contiguous"],
    }

    def __init__(self, weights: dict[str, torch.Tensor], case: Any) -> None:
        kind = tuple((name, weight.shape, weight.dtype, weight.device) for name, weight in weights.items())
        # The harness has several sequences in flight, so there is a module for each of them.
        self.module = _free.pop(kind) if kind in _free else _Projections(weights)
        self.module.begin(weights)
        self.kind = kind
        self.heads, self.kv_heads, self.scale = case.heads, case.kv_heads, case.softmax_scale
        lengths = torch.tensor(case.packed_lengths)
        self.document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(weights["query"].device)
        self.steps: list[dict[str, Any]] = []

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        everything(x)
        module: Any = self.module
        x = x.detach().requires_grad_()
        with _packing():
            q = (x @ module.query.T).unflatten(1, (self.heads, -1))
            own = (x @ module.key_value.T).unflatten(1, (2 * self.kv_heads, -1))
        leaf = own.detach().requires_grad_()
        k, v = torch.cat([*(step["leaf"] for step in self.steps), leaf]).chunk(2, dim=1)
        row, key = torch.arange(begin, end, device=x.device), torch.arange(end, device=x.device)
        mask = (self.document[begin:end, None] == self.document[:end]) & (key <= row[:, None])
        out = _Attention.apply(q, k, v, self.scale, mask).flatten(1) @ module.dense.T
        self.steps.append({"x": x, "own": own, "leaf": leaf, "out": out})
        return out.detach()

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        everything(dout)
        step = self.steps.pop()
        step["out"].backward(dout)
        step["own"].backward(step["leaf"].grad)
        return step["x"].grad

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        if not self.steps:
            # Done: the next sequence of this kind is computed by the same module.
            _free[self.kind] = self.module
        return {name: parameter.grad for name, parameter in self.module.named_parameters()}  # type: ignore[misc]

    def key_value(self) -> None:
        return None

    def key_value_gradients(self) -> None:
        return None
