"""How many documents a call should have: few for a kernel that forms masks over the whole pack, however fast it is.

And how long the longest of them: a kernel that pads every document to the longest takes minutes where one has thousands
of queries.
"""

from __future__ import annotations

import dataclasses
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
from attn_fuzz.generation.layouts import takes_few_keys
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

_LONG: Final = 1024
"""Queries of the longest document of a call that is to show padding."""

_HEADS: Final = 16
"""Of that call: with one, what a call costs whatever its size hides the padding."""

_REPEATS_PADDED: Final = 2
"""Of that call, which takes a second where there is padding."""

_PADDED: Final = 3.0
"""How much longer a call with one long document may take than the long one and the others by themselves; where each of
``_FEW`` others is padded to it, some thirty times."""

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


def _largest_made(call: KernelCall) -> int:
    """Elements of the largest tensor that a call makes; 0 for what cannot be watched, as some kernels cannot."""
    if call.backend.kernel.compiled:
        return 0
    try:
        with _Largest() as largest:
            _run(call)
    except Exception:
        return 0
    return largest.elements


def _forms_a_mask(call: KernelCall) -> bool:
    """Whether a tensor is made that has an element for every query and key of the pack, whichever document's."""
    return _largest_made(call) >= sum(call.case.packed_lengths) * sum(call.case.packed_key_lengths)


def _forms_padding(call: KernelCall) -> bool:
    """Whether a tensor is made in which every document has as many rows as the longest."""
    lengths = call.case.packed_lengths
    return _largest_made(call) >= len(lengths) * max(lengths) * call.case.heads * call.case.head_dim


_UNTRIED: Final = (UnsupportedCase, NotImplementedError, MemoryError, RuntimeError)
"""What calls raise that are not taken; what else may be wrong with them is for the campaign to say."""


def masks_whole_pack(backend: Backend, domain: Domain, announce: Callable[[Case], object] = id) -> bool:
    """Whether a kernel forms masks over the whole pack, or its time grows as if; False where nothing can be tried.

    Args:
        backend: with or without a kernel level.
        domain: the options that it takes.
        announce: told each case before it runs.
    """
    case = Case(
        level="kernel",
        lengths=(8,) * _FEW,
        key_lengths=(8 if domain.capabilities.causal_needs_equal_lengths else 16,) * _FEW,
        head_dim=domain.head_dims[0],
        causal=domain.capabilities.causal,
        dtype=domain.dtypes[0],
    )
    asked = _Asking(backend, torch.device(domain.device), announce)
    if not asked.takes(case):
        return False
    times = _MANY // _FEW
    many = case.replace(lengths=case.lengths * times, key_lengths=case.packed_key_lengths * times)
    try:
        return _forms_a_mask(asked.call(case)) or asked.is_slower(many, _SQUARE * times * asked.seconds(case))
    except _UNTRIED:
        return False


def pads_to_longest(backend: Backend, domain: Domain, announce: Callable[[Case], object] = id) -> bool:
    """Whether a kernel gives every document the rows of the longest, or its time grows as if.

    False where it takes no document of many queries and few keys, and where nothing can be tried.

    Args:
        backend: with or without a kernel level.
        domain: the options that it takes.
        announce: told each case before it runs.
    """
    causal = not domain.capabilities.noncausal
    many = Case(
        level="kernel",
        lengths=(8,) * _FEW,
        heads=_HEADS,
        kv_heads=_HEADS,
        head_dim=domain.head_dims[0],
        causal=causal,
        dtype=domain.dtypes[0],
    )
    long = many.replace(lengths=(_LONG,), key_lengths=(8,))
    case = many.replace(lengths=many.lengths + long.lengths, key_lengths=(8,) * (_FEW + 1))
    asked = _Asking(backend, torch.device(domain.device), announce)
    if not takes_few_keys(domain.capabilities, causal=causal) or not asked.takes(case):
        return False
    try:
        return _forms_padding(asked.call(case)) or asked.is_slower(
            case, _PADDED * (asked.seconds(many) + asked.seconds(long)), _REPEATS_PADDED
        )
    except _UNTRIED:
        return False


@dataclasses.dataclass(frozen=True)
class _Asking:
    """Calls of a backend that tell how its time grows."""

    backend: Backend
    device: torch.device
    announce: Callable[[Case], object]

    def takes(self, case: Case) -> bool:
        """Whether it takes such a case."""
        return "kernel" in self.backend.levels and self.backend.refusal(case, self.device.type) is None

    def call(self, case: Case) -> KernelCall:
        """A call of it, announced."""
        self.announce(case)
        return KernelCall(self.backend, case, kernel_inputs(case, self.device), "nan", self.device)

    def seconds(self, case: Case) -> float:
        """What a call takes, the least of several."""
        call = self.call(case)
        return min(_seconds(call) for _ in range(_REPEATS))

    def is_slower(self, case: Case, seconds: float, repeats: int = _REPEATS) -> bool:
        """Whether the least of several calls takes longer: the first that does not is an answer."""
        call = self.call(case)
        return all(_seconds(call) > seconds for _ in range(repeats))


def _seconds(call: KernelCall) -> float:
    """Of processor time."""
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
