"""What a backend does where nobody has stated it: a few calls tell.

The answers decide what a kernel from outside is asked, so that it is neither accused of what its kind cannot do, nor
spared what it can: a kernel that multiplies by an explicit mask mixes NaN of any document into all others (0 * NaN),
one that builds its output document by document has no rows behind the last one, and one that adds gradients up
atomically gives other last bits every time.
"""

from __future__ import annotations

import dataclasses
import functools
from operator import itemgetter

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.observation import Observation, differing
from attn_fuzz.execution.runner import run_kernel, run_layer
from attn_fuzz.generation.options import options_within
from attn_fuzz.reference.answer import Inputs, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import layer_inputs

_LENGTHS = (5, 150, 3)
"""No tile of queries of the last document can touch keys of the first."""

_REPEATED = {"cpu": (5, 150, 3), "cuda": (5, 1300, 700)}
"""Long enough for several blocks of a GPU to add to one row of dQ."""

_SIDE = 64
"""Of the window of a configuration that has one."""

TIMES = 4
"""Calls that have to agree in every bit."""


@dataclasses.dataclass(frozen=True)
class InferredCapabilities:
    """The answers."""

    capacity: bool
    """Takes rows behind the last document."""
    isolates_nonfinite: bool
    """NaN in the first document does not reach the last."""
    repeatable: bool = True
    """Forward results have the same bits every time."""
    repeatable_backward: bool = True
    """And so have gradients."""

    def repeats(self, name: str) -> bool:
        """Whether a result has the same bits every time."""
        return self.repeatable and (self.repeatable_backward or not _of_backward(name))


def _run(backend: Backend, case: Case, inputs: Inputs, device: torch.device) -> Observation | None:
    """What a call gives, or None where it raises."""
    try:
        return run_kernel(backend, case, inputs, "finite", device)
    except Exception:
        return None


def _plain(backend: Backend, device: str, lengths: tuple[int, ...], level: str = "kernel") -> Case:
    """A case of these lengths with nothing special about it."""
    stated = backend.kernel.capabilities_on(device)
    if compiled := stated.configurations or stated.compiled_first:
        # Another one would have to be compiled.
        plain = options_within(compiled[0], stated, stated.window_sizes or (_SIDE,), itemgetter(0))
        return Case(level=level, lengths=lengths, **plain)  # type: ignore[arg-type]
    head_dim = stated.head_dim_multiple * max(1, 16 // stated.head_dim_multiple)
    some = stated.head_dims or (min(head_dim, stated.max_head_dim),)
    return Case(level=level, lengths=lengths, dtype=stated.dtypes[0], head_dim=some[0], causal=stated.causal)


def _repeats(backend: Backend, where: torch.device) -> tuple[bool, bool]:
    """(forward results, gradients) have the same bits in several runs of one case."""
    level = backend.levels[0]
    case = _plain(backend, where.type, _REPEATED[where.type], level)
    runs: list[Observation] = []
    try:
        # The first one may have what calls of other shapes have left behind, which is another question.
        for _ in range(1 + TIMES):
            if level == "kernel":
                runs.append(run_kernel(backend, case, kernel_inputs(case, "cpu"), "finite", where))
            else:
                runs.append(run_layer(backend, case, layer_inputs(case, "cpu"), "finite", where))
    except Exception:
        # What falls here falls in a case of its own; a promise is not called broken for it.
        return True, True
    moved = {name for run in runs[2:] for name in differing(runs[1], run)}
    return moved.isdisjoint({"out", "lse", "k", "v"}), not {name for name in moved if name.startswith("d")}


def promises(backend: Backend, device: str, name: str) -> bool:
    """Whether it is stated, and not only what a few calls have shown, that a result has the same bits every time."""
    stated = backend.kernel.capabilities_on(device.partition(":")[0])
    return bool(stated.repeatable) and (bool(stated.repeatable_backward) or not _of_backward(name))


def _of_backward(name: str) -> bool:
    return name in ("dq", "dk", "dv", "dx") or name.startswith("d_")


@functools.lru_cache(maxsize=64)
def inferred(backend: Backend, device: str) -> InferredCapabilities:
    """Statements where there are any, measurements otherwise."""
    where = torch.device(device)
    stated = backend.kernel.capabilities_on(where.type)
    forward, backward = stated.repeatable, stated.repeatable_backward
    if forward is None or backward is None:
        seen = _repeats(backend, where)
        forward, backward = (now if told is None else told for told, now in zip((forward, backward), seen))
    if not stated.backward:
        # Of gradients that are not its own nothing is told.
        backward = False
    capacity, isolates = stated.capacity, stated.isolates_nonfinite
    if isolates is None and stated.finite_rest:
        # What is multiplied by 0 behind a document may be the next one's.
        isolates = False
    if "kernel" not in backend.levels:
        # A layer cannot be asked in one call; NaN is then kept out of its documents.
        return InferredCapabilities(bool(capacity), bool(isolates), forward, backward)
    plain = _plain(backend, where.type, _LENGTHS)
    if capacity is None:
        wide = plain.replace(capacity=3)
        observed = _run(backend, wide, kernel_inputs(wide, "cpu"), where)
        capacity = observed is not None and "out" in observed.tails
    if isolates is None:
        inputs = kernel_inputs(plain, "cpu")
        tensors = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "dout")}
        for tensor in tensors.values():
            tensor[: _LENGTHS[0]] = torch.nan
        observed = _run(backend, plain, Inputs(**tensors), where)
        last = slice(sum(_LENGTHS[:2]), None)
        isolates = observed is not None and all(
            bool(observed.results[name][last].isfinite().all()) for name in ("out", "dq", "dk", "dv")
        )
    if stated.capacity is None and not isolates and not stated.finite_rest:
        # NaN behind the last document would be multiplied by 0 as that of another document is.
        capacity = False
    return InferredCapabilities(capacity, isolates, forward, backward)
