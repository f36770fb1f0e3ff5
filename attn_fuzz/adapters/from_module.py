"""Attention as ``torch.nn.Module``, whose options are said when it is made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import torch

from attn_fuzz.adapters.call import OPTIONS, Function, parameters_of
from attn_fuzz.adapters.layouts import checked

_SIZES: Final = ("heads", "kv_heads", "head_dim")


def from_module(make: Callable[..., torch.nn.Module], *, layout: str = "bshd") -> Function:
    """A function that makes a module of every set of options, and calls it.

        kernel = adapters.by_document(
            adapters.from_module(lambda causal, softmax_scale: Attention(causal=causal, scale=softmax_scale))
        )

    A module whose options never change needs none of this: it is a function already, ``by_document(Attention())``. A
    module with projections and a K/V buffer of its own is a layer (docs/your_layer.md), not a kernel.

    Args:
        make: takes, by name, what it needs of ``heads``, ``kv_heads``, ``head_dim``, ``softmax_scale``, ``causal``,
            ``window_size`` and ``softcap``, and gives a module that is called as ``module(q, k, v)``, and by keyword
            with what else the adapter around this one is told to give. It is kept, and moved to the inputs' device.
        layout: order of the axes of ``q``, ``k`` and ``v``; that of the adapter around this one.

    Raises:
        ValueError: for a layout that there is not, or a parameter of ``make`` that is none of these; one sentence.
    """
    order, wanted = checked(layout), parameters_of(make) or {}
    if unknown := [name for name in wanted if name not in (*_SIZES, *OPTIONS)]:
        raise ValueError(f"{unknown[0]!r} is no option; a module is made of {', '.join((*_SIZES, *OPTIONS))}")

    @functools.lru_cache(maxsize=64)
    def made(device: torch.device, **options: Any) -> torch.nn.Module:
        return make(**options).to(device)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> Any:
        heads, kv_heads = (x.shape[order.index("h")] for x in (q, k))
        known = {"heads": heads, "kv_heads": kv_heads, "head_dim": q.shape[order.index("d")], **keywords}
        others = {name: value for name, value in keywords.items() if name not in wanted}
        return made(q.device, **{name: known[name] for name in wanted})(q, k, v, **others)

    kinds = inspect.Parameter
    options = [kinds(name, kinds.KEYWORD_ONLY) for name in OPTIONS if name in wanted]
    positional = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("q", "k", "v")]
    signature = inspect.Signature([*positional, *options, kinds("keywords", kinds.VAR_KEYWORD)])
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function
