"""Cases that a configuration is compiled by, so that what is drawn within it finds little left to compile.

What compilers specialise on beside the configuration is met here: totals that are a multiple of 16 and that are none, a
single token, more than a block of 128, and every memory layout.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign.configuration_pool import Step
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.fixed_calls import fixed_call
from attn_fuzz.generation.options import options_within
from attn_fuzz.reference.case import Case

LAYOUTS: Final = ((5, 33, 16), (16, 32), (1,), (150, 3))
"""Documents of the plain cases."""

_OTHER_KEYS: Final = (((16, 1, 1), (33, 33, 16)), ((33, 33, 16), (16, 1, 1)))
"""Documents of cases whose queries and keys are of different kinds, and their keys."""

_SIDE: Final = 7
"""Of windows, where sizes are no part of what is compiled."""


def _in_turn(turn: int, some: Sequence[Any]) -> Any:
    return some[turn % len(some)]


_FEW: Final = 2
"""Of no more memory layouts each is part of what is compiled, and so they are met with each layout of documents."""


def _every(step: Step, backend: Backend, domain: Domain) -> Iterator[Case | None]:
    stated, turns, configuration = domain.capabilities, itertools.count(), step.configuration
    sides, level = stated.window_sizes or (_SIDE,), "kernel" if "kernel" in backend.levels else "layer"

    def options(memory: str) -> dict[str, Any]:
        chosen = options_within(configuration, stated, sides, functools.partial(_in_turn, next(turns)))
        return {**chosen, "memory": memory}

    if step.layouts:
        memories = stated.memories if len(stated.memories) <= _FEW else ("contiguous",)
        yield from (fixed_call(step.layouts - 1, options(memory), domain) for memory in memories)
        return
    for lengths in LAYOUTS:
        yield Case(level=level, lengths=lengths, **options("contiguous"))
    for lengths, keys in _OTHER_KEYS if level == "kernel" else ():
        yield Case(level=level, lengths=lengths, key_lengths=keys, **options("contiguous"))
    for memory in stated.memories:
        if memory not in ("contiguous", "broadcast") or level == "kernel":
            yield Case(level=level, lengths=LAYOUTS[0], **options(memory))


def warm_up_cases(step: Step, backend: Backend, domain: Domain) -> Iterator[Case]:
    """Cases that a backend takes, the plainest first: as many as there are ``LAYOUTS``, then others.

    Of what compiles for shapes those of the step's last layout.

    Args:
        step: a configuration.
        backend: takes it.
        domain: options that the backend takes.
    """
    for case in _every(step, backend, domain):
        if case is not None and backend.refusal(case, domain.device) is None:
            yield case
