"""JAX functions over torch tensors, which share their memory through DLPack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from attn_fuzz.adapters.call import Function


def from_jax(function: Function) -> Function:
    """A function of JAX arrays as one of torch tensors, differentiable in its first three arguments.

        kernel = adapters.dense(adapters.from_jax(jax_attention), names={"lengths_k": "key_value_seq_lengths", ...})

    Its gradients are those of ``jax.vjp``, which runs the forward again. Inputs are copied, so memory layouts do not
    reach it, and an input that it changes is not seen.

    Args:
        function: ``function(q, k, v, *others, **keywords) -> out``; tensors among the others become arrays.
    """

    @functools.wraps(function)
    def adapted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any, **keywords: Any) -> Any:
        from attn_fuzz.backends.jax_bridge import to_jax

        arrays = [to_jax(x) if isinstance(x, torch.Tensor) else x for x in others]
        named = {name: to_jax(x) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}

        def attention(q: Any, k: Any, v: Any) -> Any:
            return function(q, k, v, *arrays, **named)

        return _Attention.apply(attention, q, k, v)

    return adapted


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        from attn_fuzz.backends.jax_bridge import call

        ctx.save_for_backward(q, k, v)
        ctx.function = function
        return call(function, q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from attn_fuzz.backends.jax_bridge import call

        def back(q: Any, k: Any, v: Any, dout: Any) -> Any:
            import jax

            return jax.vjp(ctx.function, q, k, v)[1](dout)

        return None, *call(back, *ctx.saved_tensors, gradients[0])
