"""What users declare of their code by the attribute ``capabilities``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from attn_fuzz.backends.arithmetic import KEY
from attn_fuzz.backends.declared_pairs import fits_pairs, frozen
from attn_fuzz.backends.kernel import FLOAT_DTYPES, PLACEMENTS, BackendUnavailable, Capabilities, Configuration
from attn_fuzz.backends.user_rank_layer import NUMBERS_OF_RANKS
from attn_fuzz.reference.case import FAR_MEMORIES, MEMORIES, ROTARIES
from attn_fuzz.reference.conventions import GRADIENT_ROWS, PADDING, ROTARY_POSITIONS

UNPROMISED = {
    "covers_all_rows": False,
    "capacity": None,
    "loose_max_seqlen": True,
    "crowds": None,
    "far_memories": FAR_MEMORIES,
    "compiles": None,
    "isolates_nonfinite": None,
    "repeatable": None,
    "repeatable_backward": None,
    "lse": None,
    "lse_gradient": None,
    "graphs": None,
    "traceable": None,
    "head_dims_v": None,
}
"""What is taken to hold of a user's kernel that states nothing."""


def capabilities_of(owner: object, name: str, defaults: Mapping[str, Any]) -> Capabilities:
    """Defaults narrowed by the attribute ``capabilities`` of a function or class, a dict or a ``Capabilities``."""
    declared = getattr(owner, "capabilities", {})
    if isinstance(declared, Capabilities):
        return declared
    if not isinstance(declared, Mapping):
        raise BackendUnavailable(f"{name}.capabilities must be a dict, not {type(declared).__name__}")
    known = set(Capabilities.__dataclass_fields__)
    if unknown := sorted(set(declared) - known):
        known_keys = ", ".join(sorted(known))
        raise BackendUnavailable(f"{name}.capabilities has an unknown key {unknown[0]!r}; known: {known_keys}")
    given = {key: frozen(value) for key, value in declared.items() if key != KEY}
    for key, value in given.items():
        if wanted := _misfit(key, value):
            raise BackendUnavailable(f"{name}.capabilities: {key} must be {wanted}, not {value!r}")
    found = Capabilities(**{**defaults, **given})
    if found.padding_between and found.padding == "computed":
        raise BackendUnavailable(
            f"{name}.capabilities: padding_between is for padding that is not computed; declare padding 'zero' or "
            "'skipped', too"
        )
    return found


_CHOICES = {
    "devices": ("cpu", "cuda"),
    "dtypes": FLOAT_DTYPES,
    "rotaries": ROTARIES,
    "memories": MEMORIES,
    "gaps": ("q", "k"),
    "placement_keeps_bits": PLACEMENTS,
    "far_memories": FAR_MEMORIES,
}
_WORDS = {"rotary_positions": ROTARY_POSITIONS, "gradient_rows": GRADIENT_ROWS, "padding": PADDING}


def _misfit(key: str, value: object) -> str | None:
    """What a capability must be, in words, where it is something else."""
    if key in ("gaps", "placement_keeps_bits", "far_memories") and value == ():
        return None
    if choices := _CHOICES.get(key):
        fits = isinstance(value, tuple) and value and all(item in choices for item in value)
        return None if fits else f"a list of {', '.join(choices)}"
    if words := _WORDS.get(key):
        return None if isinstance(value, str) and value in words else " or ".join(map(repr, words))
    if key == "head_dims_v":
        return None if fits_pairs(value) else "True, False or pairs of numbers from 1"
    default = Capabilities.__dataclass_fields__[key].default
    if key in NUMBERS_OF_RANKS and isinstance(value, tuple):
        return None if value and all(_whole(item) and item >= 1 for item in value) else "True, False or numbers from 1"
    if isinstance(default, bool):
        measurable = value is None and UNPROMISED.get(key, True) is None
        return None if isinstance(value, bool) or measurable else "True or False"
    if isinstance(default, int):
        least = min(default, 1)
        return None if _whole(value) and value >= least else f"a whole number from {least}"
    if key in ("configurations", "compiled_first"):
        fits = isinstance(value, tuple) and all(isinstance(item, Configuration) for item in value)
        return None if fits else "a list of backends.kernel.Configuration"
    if isinstance(default, tuple):
        fits = isinstance(value, tuple) and all(_whole(item) for item in value)
        return None if fits else "a list of whole numbers"
    return None if isinstance(value, type(default)) else f"a {type(default).__name__}"


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
