"""A kernel from outside: any function with the varlen signature that the ecosystem knows.

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0) -> out

Options that the signature lacks are not exercised. Nor are rows between documents, but for a signature that can be told
of them (``backends/gap_arguments.py``). An attribute ``capabilities`` on the function, a dict of fields of
``backends.kernel.Capabilities``, narrows what is asked of it further, and says what its arithmetic is.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attn_fuzz.backends.arithmetic import declared_facts
from attn_fuzz.backends.declared import UNPROMISED, capabilities_of
from attn_fuzz.backends.forward_only import forward_only
from attn_fuzz.backends.gap_arguments import GapArguments
from attn_fuzz.backends.importing import import_object
from attn_fuzz.backends.kernel import (
    Attended,
    AttentionOptions,
    BackendUnavailable,
    Capabilities,
    Kernel,
)
from attn_fuzz.backends.layer import Layer, LayerFactory
from attn_fuzz.backends.layer_arguments import taken_apart
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.output import MisshapenResult, require_output
from attn_fuzz.backends.rank_layer import RankLayerFactory
from attn_fuzz.backends.returned_lse import lse_of
from attn_fuzz.backends.sdpa import as_flash_does
from attn_fuzz.backends.user_layer import UserLayer, require_layer
from attn_fuzz.backends.user_rank_layer import keywords_of, over_ranks, spread_refusal, takes_one
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

# What an unknown kernel may reasonably round: more than FlashAttention does, so that a plain one is not accused.
_CAUTIOUS = Profile(
    rounds_scores=True,
    rounds_dp=True,
    scales_gradients=True,
    scales_inputs=True,
    delta_from_probabilities=True,
    stores_probabilities=True,
    may_store_products=True,
    splits_ds=True,
    expands_kv=True,
    normalises_by_lse=True,
    exp_error=20 * 2.0**-23,
    tanh_error=2.0**-11,
)

# And an unknown layer around it: norms and rotary as they are often written, and K/V gradients as autograd adds them to
# a leaf. What a layer shows tells more (attn_fuzz/oracle/trial.py).
_CAUTIOUS_LAYER = dataclasses.replace(
    _CAUTIOUS, norms_in_dtype=True, rotates_in_dtype=True, float32_angles=True, stored_sums=frozenset({"dk", "dv"})
)


def _taken_options(function: Callable[..., Any], name: str) -> set[str]:
    """Which of the optional arguments a kernel's signature has.

    Raises:
        BackendUnavailable: when it does not take the others, which every call gives it.
    """
    called = _called(function)
    try:
        signature = inspect.signature(called)
    except ValueError:
        raise BackendUnavailable(f"{name} does not tell its signature; wrap it in a Python function") from None
    parameters = signature.parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = {option for option in _OPTIONS if anything or option in parameters}
    try:
        signature.bind(*_ARGUMENTS, **dict.fromkeys(taken | GapArguments.of(called).always))
    except TypeError as error:
        raise BackendUnavailable(
            f"{name}{signature} is no varlen kernel, which is called with ({', '.join(_ARGUMENTS)}): {error}"
        ) from None
    return taken


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """What calling a function or a module calls."""
    return function.forward if isinstance(function, torch.nn.Module) else function


def _gap_arguments(function: Callable[..., Any], name: str, capabilities: Capabilities) -> GapArguments:
    """How a kernel is told of the gaps that it takes.

    Raises:
        BackendUnavailable: where it declares some that nothing tells it of.
    """
    found = GapArguments.of(_called(function), capabilities.gaps)
    if untold := [side for side in capabilities.gaps if side not in found.sides]:
        side = untold[0]
        raise BackendUnavailable(
            f"{name}.capabilities: gaps has {side!r}, but the kernel has no argument seqused_{side}"
        )
    return found


def _no_function(thing: object) -> str | None:
    """What something is that cannot be called as a kernel, in words; None for a function, a method or a module."""
    if isinstance(thing, type):
        return "a class, not a function"
    if inspect.iscoroutinefunction(thing) or inspect.isasyncgenfunction(thing):
        return "a coroutine function, which returns before it has computed anything"
    if inspect.isgeneratorfunction(thing):
        return "a generator function, which returns before it has computed anything"
    return None if callable(thing) else f"no function but of type {type(thing).__name__}"


_ARGUMENTS = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

_OPTIONS = ("softmax_scale", "causal", "window_size", "softcap")


class UserKernel(Kernel):
    """A function under test.

    Args:
        name: ``MODULE:FUNCTION`` or ``PATH.py:FUNCTION``.

    Raises:
        BackendUnavailable: when there is no such function.
    """

    profile = _CAUTIOUS

    def profile_on(self, device: str) -> Profile:
        # It may be built on torch's.
        return dataclasses.replace(as_flash_does(self.profile, device), **self.facts)

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]
        self._function = import_object(name)
        if (reason := _no_function(self._function)) is not None:
            raise BackendUnavailable(f"{name} is {reason}; name a function that returns out")
        self._takes = _taken_options(self._function, name)
        self._shown: Capabilities | None = None
        """What its calls have shown beyond what it declares."""
        from_signature = {
            "scale": "softmax_scale" in self._takes,
            "causal": "causal" in self._takes,
            "window": "window_size" in self._takes,
            "softcap": "softcap" in self._takes,
            "gaps": GapArguments.of(_called(self._function)).sides,
        }
        self.capabilities = capabilities_of(self._function, name, {**UNPROMISED, **from_signature})  # type: ignore[misc]
        self._gaps = _gap_arguments(self._function, name, self.capabilities)
        self.facts = declared_facts(self._function, name)

    def capabilities_on(self, device: str) -> Capabilities:
        return self._shown or self.capabilities

    @property
    def options(self) -> tuple[str, ...]:
        """The optional arguments that every call is given: those that the signature has."""
        return tuple(option for option in _OPTIONS if option in self._takes)

    def told_of_gaps(self, gaps: tuple[int, int]) -> tuple[str, ...]:
        """The arguments by which a call with such gaps says how long documents are; others have starts instead."""
        sides = [side for side, gap in zip("qk", gaps, strict=True) if gap]
        return tuple(name for name, side in self._gaps.used.items() if side in sides)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        if not self.capabilities.backward:
            return forward_only(self._attend, q, k, v, metadata, options)
        return self._attend(q, k, v, metadata, options)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        given = {
            "softmax_scale": options.scale,
            "causal": options.causal,
            "window_size": options.window,
            "softcap": options.softcap,
        }
        m = metadata
        returned = self._function(
            q,
            k,
            v,
            *self._gaps.sums(m),
            m.max_seqlen_q,
            m.max_seqlen_k,
            **self._gaps.given(m),
            **{key: value for key, value in given.items() if key in self._takes},
        )
        out = _output(returned)
        require_output(out, q, v)
        lse = lse_of(returned, q, self.capabilities.lse)
        if lse is not None and lse.requires_grad and self.capabilities_on(q.device.type).lse_gradient is None:
            # So it has to be right, too.
            self._shown = dataclasses.replace(self.capabilities, lse_gradient=True)
        return Attended(out, lse, self.name)


def _output(returned: object) -> Any:
    """The output of what a kernel returned: itself, or the first of ``(out, lse, ...)``.

    Raises:
        MisshapenResult: for a tuple of anything else.
    """
    if not isinstance(returned, tuple):
        return returned
    kinds = ", ".join(type(each).__name__ for each in returned)
    lse = returned[1] if len(returned) > 1 else None
    if not isinstance(lse, torch.Tensor) or not lse.is_floating_point():
        raise MisshapenResult(f"the kernel should return out, or (out, lse, ...) with tensors, but returned ({kinds})")
    return returned[0]


class InsideLayer(Kernel):
    """Stands for the kernel of a user's layer, which only the layer calls."""

    profile = _CAUTIOUS_LAYER

    def profile_on(self, device: str) -> Profile:
        # It may be built on torch's.
        return dataclasses.replace(as_flash_does(self.profile, device), **self.facts)

    def __init__(self, name: str, capabilities: Capabilities, facts: Mapping[str, Any]) -> None:
        self.name, self.capabilities, self.facts = name, capabilities, facts  # type: ignore[misc]

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        return spread_refusal(self.capabilities, case)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        raise NotImplementedError(f"{self.name} is a layer; it has no kernel to call")


def user_layer(name: str) -> tuple[InsideLayer, LayerFactory, RankLayerFactory | None]:
    """A layer class from outside, built as ``CLASS(weights, case)``; docs/your_layer.md says what it must have.

    Args:
        name: ``MODULE:CLASS`` or ``PATH.py:CLASS``, perhaps with arguments (layer_arguments.py).

    Returns:
        What stands for its kernel, what builds the layer, and what builds that of one of several ranks, if it has any.

    Raises:
        BackendUnavailable: when there is no such class, or it lacks a method, or takes no such arguments.
    """
    bare, arguments = taken_apart(name)
    made = import_object(bare)
    capabilities = capabilities_of(made, bare, UNPROMISED)
    require_layer(made, bare, arguments, capabilities, keywords_of(capabilities))
    if takes_one(capabilities):
        require_layer(made, bare, arguments, capabilities)
    built = functools.partial(made, **arguments)

    def build(weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> Layer:
        return UserLayer(built, weights, case)

    inside = InsideLayer(name, capabilities, declared_facts(made, bare))
    return inside, build, over_ranks(built, capabilities, UserLayer)
