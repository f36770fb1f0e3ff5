"""A layer from outside: its class is looked at before anything runs, and what its methods return whenever they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends.kernel import BackendUnavailable, Capabilities
from attn_fuzz.backends.layer import Layer
from attn_fuzz.backends.layer_arguments import require_arguments
from attn_fuzz.backends.output import MisshapenResult, first_mismatch
from attn_fuzz.reference.case import Case

METHODS: Final = {
    "forward": ("x", "begin", "end"),
    "backward": ("dout",),
    "parameter_gradients": (),
    "key_value": (),
    "key_value_gradients": (),
}
"""What a layer must have, with its arguments (docs/your_layer.md)."""

_OF_BACKWARD: Final = ("backward", "parameter_gradients", "key_value_gradients")


def methods_of(capabilities: Capabilities) -> dict[str, tuple[str, ...]]:
    """What a layer must have that declares these."""
    found = {name: taken for name, taken in METHODS.items() if capabilities.backward or name not in _OF_BACKWARD}
    return found | ({"restart": ("case",)} if capabilities.reusable else {})


def require_layer(
    made: Any, name: str, arguments: Mapping[str, Any], capabilities: Capabilities, keywords: Sequence[str] = ()
) -> None:
    """Sees that a class can be built and called as a layer is.

    Args:
        made: the class.
        name: what to call it.
        arguments: that it is built with, beside weights and case.
        capabilities: that it declares.
        keywords: that it is given besides, over ranks.

    Raises:
        BackendUnavailable: where it cannot, with the reason in one sentence.
    """
    if not isinstance(made, type):
        kind = "a function" if inspect.isroutine(made) else f"of type {type(made).__name__}"
        raise BackendUnavailable(f"{name} is no layer: it is {kind}, and should be a class")
    methods = methods_of(capabilities)
    if missing := [method for method in methods if not callable(getattr(made, method, None))]:
        raise BackendUnavailable(f"{name} is no layer: it has no method {missing[0]}")
    given = {**arguments, **dict.fromkeys(keywords)}
    require_arguments(made, name, arguments, ("group", "tensor_group"))
    try:
        inspect.signature(made).bind("weights", "case", **given)
    except (TypeError, ValueError) as error:
        called = ", ".join(("weights", "case", *(f"{keyword}=..." for keyword in keywords)))
        raise BackendUnavailable(f"{name} is no layer: it should be built as CLASS({called}): {error}") from None
    for method, taken in methods.items():
        _require_signature(made, method, taken, name)


def _require_signature(made: type, method: str, arguments: tuple[str, ...], name: str) -> None:
    function = inspect.getattr_static(made, method)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise BackendUnavailable(f"{name} is no layer: {method} returns before it has computed anything")
    if not inspect.isfunction(function):
        # Of other descriptors a call tells.
        return
    try:
        inspect.signature(function).bind("self", *arguments)
    except TypeError as error:
        called = f"{method}({', '.join(arguments)})"
        raise BackendUnavailable(f"{name} is no layer: {method} should be called as {called}: {error}") from None


class UserLayer(Layer):
    """A user's layer; what its methods return is what a layer's do, or is said to be something else.

    Args:
        made: the user's class, or what builds it with its arguments.
        weights: by name.
        case: the configuration.

    Raises:
        MisshapenResult: by each method, where it returns anything else; the message says what, in one sentence.
    """

    def __init__(self, made: Callable[..., Any], weights: dict[str, torch.Tensor], case: Case) -> None:
        self._layer: Any = made(weights, case)
        self._heads = (case.kv_heads, case.head_dim)

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return _like("forward", self._layer.forward(x, begin, end), x)

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        return _like("backward", self._layer.backward(dout), dout)

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        found = self._layer.parameter_gradients()
        if not isinstance(found, Mapping):
            raise MisshapenResult(
                f"parameter_gradients should give a dict of gradients by weight name, but gave {type(found).__name__}"
            )
        if not any(isinstance(gradient, torch.Tensor) for gradient in found.values()):
            raise MisshapenResult("parameter_gradients should give gradients by weight name, but gave none at all")
        return dict(found)

    def key_value(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._buffer("key_value", self._layer.key_value())

    def key_value_gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._buffer("key_value_gradients", self._layer.key_value_gradients())

    def restart(self, case: Case) -> None:
        """Tells a reusable layer of the sequence that comes next."""
        self._layer.restart(case)

    def _buffer(self, method: str, found: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        if found is None:
            return None
        fits = isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(x, torch.Tensor) for x in found)
        if not fits:
            raise MisshapenResult(f"{method} should give two tensors, of keys and of values, or None")
        for x in found:
            if x.ndim != 3 or tuple(x.shape[1:]) != self._heads:
                raise MisshapenResult(
                    f"{method} should give tensors [rows, {self._heads[0]}, {self._heads[1]}] (kv_heads, head_dim), "
                    f"but gave {list(x.shape)}"
                )
        return found[0], found[1]

    def paths(self) -> frozenset[str]:
        said: frozenset[str] = getattr(self._layer, "paths", frozenset)()
        return said


def _like(method: str, got: Any, wanted: torch.Tensor) -> torch.Tensor:
    """A result of the shape, dtype and device of what it belongs to."""
    if not isinstance(got, torch.Tensor):
        raise MisshapenResult(f"{method} should give a tensor, but gave {type(got).__name__}")
    if differs := first_mismatch(got, wanted):
        what, mine, other = differs
        raise MisshapenResult(f"the {what} of what {method} gives is {mine}, but should be {other}")
    return got
