"""Whether a kernel takes so many documents in a call that 16 bits do not count them, and comes back soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layouts import CROWD
from attn_fuzz.reference.case import Case

_SECONDS: Final = 5.0
"""Most that a call of 65,537 documents may take on a GPU, its tensors included."""

_FEW: Final = 1024
_MANY: Final = 4096
_SECONDS_OF_MANY: Final = 0.5
"""The same on a CPU of a sixteenth of them."""


def takes_crowds(base: Case, domain: Domain, seconds: Callable[[Case], float]) -> bool:
    """Whether it does; False where it says so itself, and campaigns know.

    A CPU is asked for fewer documents, twice: what masks the whole pack, or takes them one by one, shows by then.

    Args:
        base: a plain case that it takes.
        domain: what it declares to take.
        seconds: what a case takes; infinity where it does not come back.
    """
    stated = domain.capabilities
    if base.level != "kernel" or stated.crowds is not None or stated.layouts or stated.configurations:
        return False
    plain = base.replace(heads=1, kv_heads=1, key_lengths=None)
    if domain.device == "cuda":
        return seconds(plain.replace(lengths=(1,) * CROWD)) < _SECONDS
    few, many = (seconds(plain.replace(lengths=(1,) * documents)) for documents in (_FEW, _MANY))
    return many < _SECONDS_OF_MANY and many < 2 * _MANY / _FEW * few
