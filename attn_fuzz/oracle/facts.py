"""What a user may declare of a kernel's arithmetic, one fact at a time, and a kernel as if it had been."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from attn_fuzz.backends.registry import Backend
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.profile import Profile

_FORMATS: Final = {"tf32": "TF32", "bf16": "bf16", "fp16": "fp16"}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that a user may declare."""

    words: str
    """What it looks like."""
    fields: Mapping[str, Any]
    """Of ``Profile``."""


_LAYERS_ONLY: Final = {"projections", "norms_in_dtype", "rotates_in_dtype", "float32_angles"}

_FLAGS: Final = {
    "scales_inputs": "queries or keys that are scaled and stored before their product",
    "scales_gradients": "gradients that are stored before they are scaled",
    "rounds_scores": "scores stored in the dtype",
    "rounds_dp": "dP stored in the dtype",
    "rounds_probabilities": "probabilities rounded to the dtype for their products",
    "rounds_ds": "dS rounded to the dtype for its products",
    "stores_probabilities": "probabilities that the backward takes as they are stored",
    "stores_products": "P dP stored in the dtype",
    "expands_kv": "dK and dV stored for every query head before they are summed",
    "normalises_by_lse": "an output normalised by the stored LSE",
    "norms_in_dtype": "norms stored before they are weighted",
    "rotates_in_dtype": "rotary in the dtype",
    "float32_angles": "float32 rotary angles",
}
"""Facts that user code has by default, and a stricter declaration may have taken away."""


def all_facts() -> Iterator[Fact]:
    for form, words in _FORMATS.items():
        yield Fact(f"{words} products", {"products": form})
        yield Fact(f"{words} projections", {"projections": form})
        yield Fact(f"{words} products and projections", {"products": form, "projections": form})
    for form in ("fp16", "bf16"):
        yield Fact(f"{form} scores", {"scores_dtype": form})
        yield Fact(f"{form} probabilities", {"probabilities_dtype": form})
    for power in (-16, -12, -8):
        yield Fact(f"exponentials good to 2^{power}", {"exp_error": 2.0**power})
    for names in (("dq",), ("dk", "dv"), ("dq", "dk", "dv")):
        yield Fact(f"sums of {', '.join(names)} in the dtype", {"atomic_sums": frozenset(names)})
    for flag, words in _FLAGS.items():
        yield Fact(words, {flag: True})


def loosens(fact: Fact, trial: Trial) -> bool:
    """Whether a backend's profile lacks a fact, and the fact says something of a case."""
    if trial.case.level == "kernel" and _LAYERS_ONLY & set(fact.fields):
        return False
    name, value = next(iter(fact.fields.items()))
    mine = getattr(trial.profile, name)
    if isinstance(value, str):
        return not mine and value != trial.case.dtype
    if isinstance(value, frozenset):
        return not value <= mine
    return bool(value > mine)


def declaring(backend: Backend, fields: Mapping[str, Any]) -> Backend:
    """A backend as if its kernel had declared fields of its profile."""
    kernel, plain = copy.copy(backend.kernel), backend.kernel

    def profile_on(device: str) -> Profile:
        return dataclasses.replace(plain.profile_on(device), **fields)

    kernel.profile_on = profile_on  # type: ignore[method-assign]
    return dataclasses.replace(backend, kernel=kernel)
