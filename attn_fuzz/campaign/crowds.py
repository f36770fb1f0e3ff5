"""Whether a kernel takes so many documents in a call that 16 bits do not count them, and comes back soon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layouts import CROWD
from attn_fuzz.reference.case import Case

_SECONDS: Final = 5.0
"""Most that a call of 65,537 documents may take on a GPU, its tensors included."""

_FEWEST, _FEWER, _FEW, _MANY = 16, 256, 1024, 4096
_SECONDS_OF_MANY: Final = 0.5
"""The same on a CPU of a sixteenth of them."""

_BEYOND: Final = 2.0
"""Times that: what few documents foretell for many is not asked for any more."""


def takes_crowds(base: Case, domain: Domain, seconds: Callable[[Case], float]) -> bool:
    """Whether it does; False where it says so itself, and campaigns know.

    A CPU is asked for fewer documents: what masks the whole pack, or takes them one by one, shows by then. Of these
    last a few hundred tell, on either device, how long thousands would take.

    Args:
        base: a plain case that it takes.
        domain: what it declares to take.
        seconds: what a case takes; infinity where it does not come back.
    """
    stated = domain.capabilities
    if base.level != "kernel" or stated.crowds is not None or stated.layouts or stated.configurations:
        return False
    plain = base.replace(heads=1, kv_heads=1, key_lengths=None)

    def taken(documents: int) -> float:
        return seconds(plain.replace(lengths=(1,) * documents))

    most, bound = (CROWD, _SECONDS) if domain.device == "cuda" else (_MANY, _SECONDS_OF_MANY)
    fewest, fewer = taken(_FEWEST), taken(_FEWER)
    each = (fewer - fewest) / (_FEWER - _FEWEST)
    if math.isinf(fewer) or fewer + each * (most - _FEWER) > _BEYOND * bound:
        return False
    if domain.device == "cuda":
        return taken(CROWD) < _SECONDS
    few, many = taken(_FEW), taken(_MANY)
    return many < _SECONDS_OF_MANY and many < 2 * _MANY / _FEW * few
