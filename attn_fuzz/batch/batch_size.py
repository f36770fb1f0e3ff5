"""How many documents a call should have: few for a kernel that forms masks over the whole pack, however fast it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.runner import KernelCall
from attn_fuzz.generation.domain import Domain
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.batched import free_bytes
from attn_fuzz.reference.case import Case

_FEW: Final = 32
_MANY: Final = 256
_REPEATS: Final = 5
"""The fastest of so many counts: beside other work, caches are another process's most of the time."""

_SQUARE: Final = 3.0
"""How much a document's time may grow by from few to many: not at all where documents are apart, eightfold where a mask
over all of them is all that counts, and more where that no longer fits into caches."""

_TOKENS: Final = 700
"""Queries and keys of a call beyond which masks over the whole pack take longer than the reference does."""


_BYTES: Final = 100
"""What a pair of a query and a key takes, whichever document's they are, where scores of the whole pack are kept: a
few heads of them, a few times over, in float32."""

_MEMORY_SHARE: Final = 4


class _Largest(TorchDispatchMode):
    """Sees how many elements the largest tensor has that torch's own operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (x.numel() for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor))
        # Of ragged tensors it may be no number.
        self.elements = max(self.elements, *(count for count in made if isinstance(count, int)), 0)
        return result


def _run(call: KernelCall) -> None:
    call.forward()
    call.backward()


def _forms_a_mask(call: KernelCall) -> bool:
    """Whether a tensor is made that has an element for every query and key of the pack, whichever document's."""
    pairs = sum(call.case.packed_lengths) * sum(call.case.packed_key_lengths)
    if call.backend.kernel.compiled:
        return False
    try:
        with _Largest() as largest:
            _run(call)
    except Exception:
        # What some kernels do cannot be watched.
        return False
    return largest.elements >= pairs


def masks_whole_pack(backend: Backend, domain: Domain, announce: Callable[[Case], object] = id) -> bool:
    """Whether a kernel forms masks over the whole pack, or its time grows as if; False where nothing can be tried.

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
        device = torch.device(domain.device)
        call = KernelCall(backend, case, kernel_inputs(case, device), "nan", device)
        if _forms_a_mask(call):
            return True
        try:
            taken.append(min(_seconds(call) for _ in range(_REPEATS)) / count)
        except (UnsupportedCase, NotImplementedError, MemoryError, RuntimeError):
            # What is wrong with it is for the campaign to say.
            return False
    return taken[1] > _SQUARE * taken[0]


def _seconds(call: KernelCall) -> float:
    started = time.process_time()
    _run(call)
    return time.process_time() - started


def bearable(longest: tuple[int, int]) -> int:
    """Documents of up to such a size whose scores over the whole pack there is memory for."""
    pairs = max(longest[0] * longest[1] / 4, 1.0)
    return max(affordable(longest), math.isqrt(int(free_bytes() / _MEMORY_SHARE / _BYTES / pairs)))


def affordable(longest: tuple[int, int]) -> int:
    """Documents of up to such a size in a call of a kernel that masks the whole pack."""
    return max(4, 2 * _TOKENS // sum(longest))
