"""What user code says of its own arithmetic: fields of ``reference.profile.Profile`` by name, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from attn_fuzz.backends.kernel import BackendUnavailable, Capabilities
from attn_fuzz.reference.profile import Profile

KEY: Final = "arithmetic"
"""Of ``capabilities``."""

LIKE: Final = "like"
"""Of ``arithmetic``: a name of ``NAMED``, whose facts hold but for those that are said beside it."""

_FUSED: Final = {
    "scales_inputs": False,
    "scales_gradients": False,
    "rounds_scores": False,
    "rounds_dp": False,
    "delta_from_probabilities": False,
    "stores_probabilities": False,
    "may_store_products": False,
    "splits_ds": False,
    "expands_kv": False,
    "stores_partial_sums": False,
}

NAMED: Final[Mapping[str, Mapping[str, Any]]] = {
    "fused": _FUSED,
    "float32": {**_FUSED, "delta_from_output": False, "rounds_probabilities": False, "rounds_ds": False},
}
"""Arithmetic with a name. ``fused``: as FlashAttention computes, with P and dS in the dtype for their products and all
else in float32; ``float32``: those too, and D, so that nothing is rounded but results."""

_LARGEST_ERROR: Final = 0.125
"""Of an exponential or a tanh: beyond, a budget of the first order says nothing."""


def declared_facts(owner: object, name: str) -> dict[str, Any]:
    """Fields of a profile as the attribute ``capabilities`` of a function or class declares them.

    Args:
        owner: a kernel function or a layer class.
        name: what to call it.

    Raises:
        BackendUnavailable: for a fact that there is not, or a value that is none of its.
    """
    capabilities = getattr(owner, "capabilities", {})
    told = capabilities.arithmetic if isinstance(capabilities, Capabilities) else capabilities.get(KEY, {})
    if isinstance(told, str):
        told = {LIKE: told}
    if not isinstance(told, Mapping):
        raise BackendUnavailable(f"{name}.capabilities: {KEY} must be a dict, or a name, not {type(told).__name__}")
    facts = {fact: value for fact, value in told.items() if fact != LIKE}
    fields = {field.name: field for field in dataclasses.fields(Profile)}
    if unknown := sorted(str(fact) for fact in facts if fact not in fields):
        known = ", ".join(sorted(fields))
        raise BackendUnavailable(f"{name}.capabilities: {KEY} has an unknown fact {unknown[0]!r}; known: {known}")
    given = {fact: _named(value) for fact, value in facts.items()}
    for fact, value in given.items():
        fits, wanted = _wanted(fact)
        if not fits(value):
            raise BackendUnavailable(f"{name}.capabilities: {KEY}: {fact} must be {wanted}, not {facts[fact]!r}")
    return {**_like(told, name), **given}


def _like(told: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The facts of the arithmetic that is named, or none."""
    if LIKE not in told:
        return {}
    if not isinstance(told[LIKE], str) or told[LIKE] not in NAMED:
        known = " or ".join(map(repr, NAMED))
        raise BackendUnavailable(f"{name}.capabilities: {KEY} is like {known}, not like {told[LIKE]!r}")
    return dict(NAMED[told[LIKE]])


def _named(value: object) -> object:
    """A list of names as a set; anything else as it is."""
    if isinstance(value, (list, tuple, set)) and all(isinstance(each, str) for each in value):
        return frozenset(value)
    return value


def _wanted(fact: str) -> tuple[Callable[[object], bool], str]:
    """Whether a value is one of a fact's, and what those are in words."""
    default = Profile.__dataclass_fields__[fact].default
    if isinstance(default, bool):
        return lambda value: isinstance(value, bool), "True or False"
    if isinstance(default, float):
        words = f"a relative error from 0 to {_LARGEST_ERROR}"
        return lambda value: _number(value) and 0 <= value <= _LARGEST_ERROR, words
    if choices := _FORMATS.get(fact):
        return lambda value: isinstance(value, str) and value in choices, " or ".join(map(repr, choices))
    if names := _SUMS.get(fact):
        return lambda value: isinstance(value, frozenset) and value <= set(names), f"a list of {', '.join(names)}"
    # Of a layer's results, whose names depend on its weights.
    return lambda value: isinstance(value, frozenset) and all(isinstance(each, str) for each in value), _RESULTS


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_FORMATS: Final = {
    "products": ("", "tf32", "bf16", "fp16"),
    "projections": ("", "tf32", "bf16", "fp16"),
    "scores_dtype": ("", "bf16", "fp16"),
    "probabilities_dtype": ("", "bf16", "fp16"),
}
_SUMS: Final = {"atomic_sums": ("dq", "dk", "dv")}
_RESULTS: Final = "a list of results, such as dk and d_query"
