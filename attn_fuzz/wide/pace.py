"""How many documents a call should have: few for a kernel that forms masks over the whole pack, however fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch

from attn_fuzz.strategies import Domain
from attn_fuzz.wide.call import Call, run
from backends.kernel import UnsupportedCase
from backends.registry import Backend
from reference.case import Case

_FEW: Final = 32
_MANY: Final = 256
_REPEATS: Final = 5
"""The fastest of so many counts: beside other work, caches are somebody else's most of the time."""

_SQUARE: Final = 3.0
"""How much a document's time may grow by from few to many: not at all where documents are apart, eightfold where a mask
over all of them is all that counts, and more where that no longer fits into caches."""

_TOKENS: Final = 700
"""Queries and keys of a call beyond which masks over the whole pack take longer than the reference does."""


def masks_whole_pack(backend: Backend, domain: Domain, announce: Callable[[Case], object] = id) -> bool:
    """Whether a kernel's time grows with the square of the pack, as trying shows; False where nothing can be tried.

    Args:
        backend: with or without a kernel level.
        domain: the options that it takes.
        announce: told each case before it runs.
    """
    taken = []
    for count in (_FEW, _MANY):
        case = Case(
            level="kernel",
            lengths=(8,) * count,
            key_lengths=(8 if domain.capabilities.causal_needs_equal_lengths else 16,) * count,
            head_dim=domain.head_dims[0],
            causal=domain.capabilities.causal,
            dtype=domain.dtypes[0],
        )
        if "kernel" not in backend.levels or backend.refusal(case, domain.device) is not None:
            return False
        announce(case)
        call = Call.of(case, torch.device(domain.device))
        try:
            taken.append(min(_seconds(call, backend) for _ in range(_REPEATS)) / count)
        except (UnsupportedCase, NotImplementedError, MemoryError, RuntimeError):
            # What is wrong with it is for the hunt to say.
            return False
    return taken[1] > _SQUARE * taken[0]


def _seconds(call: Call, backend: Backend) -> float:
    started = time.process_time()
    run(call, backend)
    return time.process_time() - started


def affordable(longest: tuple[int, int]) -> int:
    """Documents of up to such a size in a call of a kernel that masks the whole pack."""
    return max(4, 2 * _TOKENS // sum(longest))
