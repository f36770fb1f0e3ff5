"""One varlen call as adapters see it, and the kernel that they make of somebody's function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.output import as_output

ARGUMENTS: Final = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
OPTIONS: Final = ("softmax_scale", "causal", "window_size", "softcap")

Function = Callable[..., Any]
Names = Mapping[str, str | None]
"""What a function calls what it is given: this project's name to its own; None for what it is not given."""


class Document(NamedTuple):
    """Where a document with queries and keys lies."""

    rows: slice
    keys: slice

    @property
    def queries(self) -> int:
        """How many queries."""
        return int(self.rows.stop - self.rows.start)

    @property
    def seen(self) -> int:
        """How many keys."""
        return int(self.keys.stop - self.keys.start)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a varlen kernel is given."""

    q: torch.Tensor
    """``[rows_q, heads, head_dim]``; rows beyond the last document belong to nobody."""
    k: torch.Tensor
    """``[rows_k, kv_heads, head_dim]``"""
    v: torch.Tensor
    """``[rows_k, kv_heads, value_dim]``"""
    cu_seqlens_q: torch.Tensor
    """int32 ``[documents + 1]``"""
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    options: Mapping[str, Any]
    """Of ``OPTIONS``, those that were given."""

    @functools.cached_property
    def documents(self) -> list[Document]:
        """Those that have both queries and keys."""
        sides = (sums.unfold(0, 2, 1).tolist() for sums in (self.cu_seqlens_q, self.cu_seqlens_k))
        pairs = [Document(slice(*rows), slice(*keys)) for rows, keys in zip(*sides, strict=True)]
        return [document for document in pairs if document.queries and document.seen]

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) with causality folded in, -1 for no bound."""
        left, right = self.options.get("window_size", (-1, -1))
        return (left, 0) if self.options.get("causal", False) else (left, right)

    def require_as_many_keys(self) -> None:
        """Raises NotImplementedError, a refusal, unless every document has as many keys as queries."""
        if self.q.shape[0] != self.k.shape[0] or not torch.equal(self.cu_seqlens_q, self.cu_seqlens_k):
            raise NotImplementedError("the kernel takes documents with as many keys as queries only")

    def nothing(self) -> torch.Tensor:
        """Zeros as the output, differentiable: what comes of a call in which no query has a key."""
        none = self.q[:0].sum() + self.k[:0].sum() + self.v[:0].sum()
        return self.q.new_zeros(as_output(self.q, self.v).shape) + none


class AdaptedKernel:
    """A varlen kernel ``kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options) -> out``.

    Args:
        function: what it was made of.
        run: makes the output of a call, or ``(out, lse)``.
        options: of ``OPTIONS``, those that are taken.
        defaults: what is true of the shape, by fields of ``backends.kernel.Capabilities``.
        capabilities: what is known of the function; goes before what it says itself, and before ``defaults``.
    """

    def __init__(
        self,
        function: Function,
        run: Callable[[Call], Any],
        options: Sequence[str],
        defaults: Mapping[str, Any],
        capabilities: Mapping[str, Any] | None,
    ) -> None:
        self._run = run
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))
        self.__qualname__ = str(getattr(function, "__qualname__", self.__name__))
        self.__module__ = str(getattr(function, "__module__", __name__))
        self.__doc__ = getattr(function, "__doc__", None)
        declared = getattr(function, "capabilities", {})
        said = vars(declared) if isinstance(declared, Capabilities) else declared
        self.capabilities = {**defaults, **said, **(capabilities or {})}
        kinds = inspect.Parameter
        positional = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ARGUMENTS]
        keywords = [kinds(name, kinds.KEYWORD_ONLY, default=_DEFAULTS[name]) for name in OPTIONS if name in options]
        self.__signature__ = inspect.Signature([*positional, *keywords])

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        bound = self.__signature__.bind(*arguments, **options)
        bound.apply_defaults()
        given = {name: bound.arguments.pop(name) for name in ARGUMENTS}
        return self._run(Call(**given, options=bound.arguments))


_DEFAULTS: Final = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0}


def parameters_of(function: Function) -> Mapping[str, inspect.Parameter] | None:
    """A function's parameters by name, or None where it does not tell them, as functions in C++ do not."""
    try:
        return inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function).parameters
    except ValueError:
        return None


def taken(function: Function, offered: Sequence[str], names: Names | None) -> dict[str, str]:
    """What of an offer a function takes by keyword: this project's name to its own.

    Args:
        function: whose parameters are looked at: those that are called as the offer are taken.
        offered: names of this project.
        names: what else is taken, and under which name; None for what is not.

    Raises:
        ValueError: for a name that is not offered, or that the function has no parameter of; one sentence.
    """
    names = names or {}
    if unknown := sorted(set(names) - set(offered)):
        raise ValueError(f"names has {unknown[0]!r}, which is not offered here; offered: {', '.join(offered)}")
    parameters = parameters_of(function)
    found: dict[str, str | None] = {name: name for name in offered if name in (parameters or {})}
    found |= names
    taken = {ours: theirs for ours, theirs in found.items() if theirs is not None}
    if parameters is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for ours, theirs in taken.items():
            if theirs not in parameters:
                raise ValueError(f"names says that {ours} is {theirs!r}, but the function has no such parameter")
    return taken
