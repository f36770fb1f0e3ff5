"""Varlen kernels that are called otherwise: other orders, other names, q, k and v in one tensor, an LSE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.adapters.call import ARGUMENTS, OPTIONS, AdaptedKernel, Call, Function, Names, parameters_of, taken
from attn_fuzz.adapters.layouts import arranged, checked, restored
from attn_fuzz.adapters.lse import Lse, require_shape, split


def _one(name: str) -> Callable[[Call], Any]:
    """Of one name for queries and keys, as self-attention has it."""

    def both(call: Call) -> Any:
        call.require_as_many_keys()
        return getattr(call, f"{name}_q")

    return both


def _qkv(call: Call) -> torch.Tensor:
    call.require_as_many_keys()
    return torch.stack([call.q, call.k, call.v], 1)


_MADE: Final[Mapping[str, Callable[[Call], Any]]] = {
    "qkv": _qkv,
    "kv": lambda call: torch.stack([call.k, call.v], 1),
    "cu_seqlens": _one("cu_seqlens"),
    "max_seqlen": _one("max_seqlen"),
    "lengths_q": lambda call: call.cu_seqlens_q.diff(),
    "lengths_k": lambda call: call.cu_seqlens_k.diff(),
}
"""What else a function may be given, made of a call."""

_SELF: Final = {"qkv", "cu_seqlens", "max_seqlen"}
"""Of these, what serves queries and keys alike."""


def _value(call: Call, name: str, layout: str) -> Any:
    """An argument or option of a function by this project's name."""
    if name in OPTIONS:
        return call.options[name]
    value = _MADE[name](call) if name in _MADE else getattr(call, name)
    return arranged(value[None], layout) if name in ("q", "k", "v") else value


def varlen(
    function: Function,
    *,
    arguments: Sequence[str] | None = None,
    names: Names | None = None,
    layout: str = "thd",
    lse: Lse | None = None,
    capabilities: Mapping[str, Any] | None = None,
) -> AdaptedKernel:
    """A packed kernel with another order or other names of its arguments, other axes, or an LSE beside its output.

        kernel = adapters.varlen(
            their_function,
            arguments=("q", "k", "v", "cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k", "max_seqlen_k"),
            names={"softmax_scale": "sm_scale", "causal": "is_causal"},
            lse=adapters.Lse("th", base="2"),
        )

    Args:
        function: gives the output, in ``layout``, or a tuple that begins with it.
        arguments: what it is given by position, in order: ``q``, ``k``, ``v``, ``qkv`` ``[t, 3, h, d]``, ``kv``
            ``[t, 2, h, d]``, ``cu_seqlens_q`` and ``_k`` (int32 ``[documents + 1]``), ``max_seqlen_q`` and ``_k``,
            ``lengths_q`` and ``_k`` (int32 ``[documents]``), ``cu_seqlens`` and ``max_seqlen`` where one serves
            queries and keys, and options; those that are in ``names`` go by keyword instead. None: as its parameters
            are called, where these are such names, and otherwise the seven that every varlen kernel is given.
        names: what it calls the same by keyword; options that are parameters of it under this project's name need none.
        layout: order of the axes of ``q``, ``k``, ``v`` and the output: ``thd``, ``htd``, ``bthd`` or ``bhtd``, whose
            ``b`` is 1.
        lse: how it gives its LSE, which then is judged; without it, what it gives beside the output is ignored.
        capabilities: what else is true of it, by fields of ``backends.kernel.Capabilities``. By default a single
            ``cu_seqlens`` or ``qkv`` refuses documents with other numbers of keys than of queries, ``qkv`` grouped
            heads, and ``qkv`` and ``kv`` values of another head_dim.

    Raises:
        ValueError: for a name, layout or argument that there is not; one sentence.
    """
    offered = (*ARGUMENTS, *_MADE, *OPTIONS)
    arguments = _order_of(function, offered) if arguments is None else arguments
    if unknown := [name for name in arguments if name not in offered]:
        raise ValueError(f"arguments has {unknown[0]!r}, which is not offered; offered: {', '.join(offered)}")
    order, names = checked(layout), names or {}
    positional = [name for name in arguments if name not in names]
    keywords = taken(function, [name for name in offered if name not in positional], names)
    # An argument that has the name of a parameter is one only where it was asked for.
    keywords = {ours: theirs for ours, theirs in keywords.items() if ours in names or ours in OPTIONS}
    given = {*positional, *keywords}

    def run(call: Call) -> Any:
        by_position = [_value(call, name, order) for name in positional]
        by_keyword = {theirs: _value(call, ours, order) for ours, theirs in keywords.items()}
        out, found = split(function(*by_position, **by_keyword), lse)
        if isinstance(out, torch.Tensor) and out.dim() == len(order):
            out = restored(out, order)[0]
        if found is None:
            return out
        return out, require_shape(found[0] if found.dim() == 3 else found, call.q.shape[:2][::-1], "the LSE")

    defaults = _defaults(given, lse)
    return AdaptedKernel(function, run, [name for name in OPTIONS if name in given], defaults, capabilities)


def _order_of(function: Function, offered: Sequence[str]) -> Sequence[str]:
    """The names of a function's positional parameters, as far as they are offered, if all that it must have are."""
    leading: list[str] = []
    for name, parameter in (parameters_of(function) or {}).items():
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        if name not in offered:
            return leading if leading and parameter.default is not parameter.empty else ARGUMENTS
        leading.append(name)
    return leading or ARGUMENTS


def _defaults(given: set[str], lse: Lse | None) -> dict[str, Any]:
    """What is true of a function that is given these."""
    found: dict[str, Any] = {} if lse is None else {"lse": True}
    if given & _SELF:
        found["causal_needs_equal_lengths"] = True
    if "qkv" in given:
        found["gqa"] = False
    if given & {"qkv", "kv"}:
        # One tensor has one number of channels.
        found["head_dims_v"] = False
    return found


def packed_qkv(
    function: Function,
    *,
    names: Names | None = None,
    lse: Lse | None = None,
    capabilities: Mapping[str, Any] | None = None,
) -> AdaptedKernel:
    """``function(qkv, cu_seqlens, max_seqlen, **options)`` with ``qkv [t, 3, h, d]``.

        kernel = adapters.packed_qkv(flash_attn.flash_attn_varlen_qkvpacked_func, capabilities={"devices": ("cuda",)})

    Documents with other numbers of keys than of queries are refused, and so are grouped heads. The arguments and errors
    are those of ``varlen``.
    """
    arguments = ("qkv", "cu_seqlens", "max_seqlen")
    return varlen(function, arguments=arguments, names=names, lse=lse, capabilities=capabilities)


def packed_kv(
    function: Function,
    *,
    names: Names | None = None,
    lse: Lse | None = None,
    capabilities: Mapping[str, Any] | None = None,
) -> AdaptedKernel:
    """``function(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)`` with ``kv [t, 2, h, d]``.

        kernel = adapters.packed_kv(flash_attn.flash_attn_varlen_kvpacked_func, capabilities={"devices": ("cuda",)})

    The arguments and errors are those of ``varlen``.
    """
    return varlen(function, arguments=("q", "kv", *ARGUMENTS[3:]), names=names, lse=lse, capabilities=capabilities)
