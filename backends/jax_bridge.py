"""JAX's attention for torch tensors: documents as padded batch elements, memory shared through DLPack."""

from __future__ import annotations

import functools
import os
from typing import Any, Final, NamedTuple

import torch

ROWS: Final = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES: Final = (1, 2, 4, 8, 16, 32)


class Options(NamedTuple):
    """What a call is compiled for, beside its shapes."""

    scale: float
    causal: bool
    left: int


def bucket(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of ``sizes`` that holds ``size``, or ``size`` itself beyond them."""
    return next((some for some in sizes if size <= some), size)


@functools.cache
def _functions(options: Options) -> tuple[Any, Any]:
    """Compiled forward and backward."""
    # JAX would take three quarters of the GPU for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    def attention(q: Any, k: Any, v: Any, lengths_q: Any, lengths_k: Any) -> Any:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=options.scale,
            is_causal=options.causal,
            query_seq_lengths=lengths_q,
            key_value_seq_lengths=lengths_k,
            local_window_size=None if options.left < 0 else (options.left, 0),
            implementation="cudnn",
        )

    def gradients(q: Any, k: Any, v: Any, lengths_q: Any, lengths_k: Any, dout: Any) -> Any:
        return jax.vjp(lambda q, k, v: attention(q, k, v, lengths_q, lengths_k), q, k, v)[1](dout)

    return jax.jit(attention), jax.jit(gradients)


def to_jax(x: torch.Tensor) -> Any:
    """A JAX array of the same memory, which is a copy where a tensor's is not in order."""
    # JAX would take three quarters of the GPU for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax.dlpack.from_dlpack(x.detach().contiguous())


def call(function: Any, *tensors: torch.Tensor) -> Any:
    """Runs a JAX function on torch tensors; the two have streams of their own, so each waits for the other."""
    if tensors[0].is_cuda:
        return _call_on_gpu(function, *tensors)
    # Arrays of a CPU begin where vectors may, and are never written.
    arrays = [to_jax(x.detach().clone(memory_format=torch.contiguous_format)) for x in tensors]
    return _to_torch(function(*arrays))


def _to_torch(result: Any) -> Any:
    """Copies of a function's results."""
    import jax

    return jax.tree.map(lambda x: torch.from_dlpack(x).clone(), jax.block_until_ready(result))


def _call_on_gpu(function: Any, *tensors: torch.Tensor) -> Any:
    import jax

    device = tensors[0].device
    # JAX makes the last GPU of several the current one when it first looks at them, and torch hands out tensors of the
    # current one only.
    jax.local_devices()
    torch.cuda.set_device(device)
    torch.cuda.synchronize()
    result = jax.block_until_ready(function(*map(to_jax, tensors)))
    torch.cuda.set_device(device)
    return _to_torch(result)


class PaddedAttention(torch.autograd.Function):
    """Attention ``[batch, rows, heads, head_dim]`` of padded documents."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths_q, lengths_k, options = rest
        ctx.save_for_backward(q, k, v, lengths_q, lengths_k)
        ctx.options = options
        out = call(_functions(options)[0], q, k, v, lengths_q, lengths_k)
        assert isinstance(out, torch.Tensor)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq, dk, dv = call(_functions(ctx.options)[1], *ctx.saved_tensors, gradients[0])
        return dq, dk, dv, None, None, None
