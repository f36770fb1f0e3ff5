"""The layer calls of a batch, one after another, each as itself: forward of all its micro-sequences, then backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.interfering import crossing, interfering_call
from attn_fuzz.execution import observation
from attn_fuzz.execution.autograd_threads import autograd_threads
from attn_fuzz.execution.failures import note_failure
from attn_fuzz.execution.kept_results import Arenas
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.execution.poison import poisoned, prime_again
from attn_fuzz.execution.runner import LayerRun, around
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import layer_inputs
from attn_fuzz.reference.values import DTYPES

OF_TOKENS: Final = ("out", "dx", "k", "v", "dk", "dv")
"""Results that have a row for each token; all others are gradients of parameters, one for each call."""

_OPTIONAL: Final = ("k", "v", "dk", "dv")
"""Buffers, which a layer need not show."""

_IN_CASE_DTYPE: Final = ("out", "dx")


@dataclasses.dataclass(frozen=True)
class LayerHow:
    """In which way layer calls are run."""

    watched: bool = True
    """Whether buffers, and what was handed back, are compared step by step."""
    backwards: bool = False
    """The last call first."""
    interfered: bool = False
    """Whether each runs around an interfering call of its own (cases/interfering.py)."""
    filled: bool = False
    """Whether a GPU's memory is filled at every allocation, and not its free blocks before every call."""
    threaded: bool = False
    """Whether backwards run in a thread of autograd's own."""
    others: tuple[int, LayerHow] | None = None
    """From which call on they are run in which other way; None for not at all."""

    def parts(self, count: int) -> list[tuple[range, LayerHow]]:
        """Which of so many calls run in which way, in order."""
        first, other = self.others or (count, self)
        first = min(first, count)
        parts = [part for part in ((range(first), self), (range(first, count), other)) if part[0]]
        return [(order[::-1], how) for order, how in parts[::-1]] if self.backwards else parts


@dataclasses.dataclass
class LayerResults:
    """What came out of a run of all calls."""

    results: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """On the device: ``[tokens, ...]`` of ``OF_TOKENS``, ``[calls, ...]`` of parameters' gradients; 0 where a call
    brought nothing."""
    broken: dict[int, str] = dataclasses.field(default_factory=dict)
    """Calls that raised, or gave something else than was asked for, in words."""
    incomplete: set[int] = dataclasses.field(default_factory=set)
    """Those of them that raised nothing, but gave no such result, or one of another shape or dtype."""
    refused: dict[int, str] = dataclasses.field(default_factory=dict)
    """Calls that the backend refused, in words."""
    strayed: dict[int, str] = dataclasses.field(default_factory=dict)
    """Calls that wrote where nothing may be written, in words."""
    unlike: set[int] = dataclasses.field(default_factory=set)
    """Calls on ranks that have other bits in what each of them has whole."""
    alive: set[int] = dataclasses.field(default_factory=set)
    """Calls on ranks one of which has a gradient where it has attended to nothing."""
    paths: set[str] = dataclasses.field(default_factory=set)
    """Implementations that ran."""


def run_layer_calls(
    tensors: LayerTensors,
    backend: Backend,
    cases: Sequence[Case],
    poison: str,
    how: LayerHow,
    beat: Callable[[], None] = lambda: None,
) -> LayerResults:
    """Forward and backward of every call, one after another.

    Args:
        tensors: the calls in their places.
        backend: whose layer.
        cases: each of the calls, as a case of its own.
        poison: contents of unwritten memory.
        how: in which way.
        beat: called before every call, so that a slow layer is not taken for one that hangs.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    found = LayerResults()
    meant = backend.kernel.paths_on(tensors.device.type)
    got: list[dict[str, torch.Tensor]] = [{} for _ in cases]
    arenas = arenas_of(cases, tensors.batch.case, tensors.weights)
    for order, own in how.parts(len(cases)):
        strays = _Strays(found, watched=own.watched)
        filled = own.filled and not backend.kernel.compiled
        with poisoned(poison, tensors.device, free_blocks=not filled), autograd_threads(own=own.threaded):
            for index in order:
                beat()
                if not filled:
                    prime_again(poison, tensors.device)
                run = LayerRun(backend, cases[index], tensors, index, arenas.of_call(index), watched=own.watched)
                try:
                    _through(run, poison, interfered=own.interfered)
                    got[index] = run.results()
                    strays.add(index, run)
                    paths: frozenset[str] = getattr(run.layer, "paths", frozenset)()
                    found.paths |= paths
                    if wrong := sorted(paths - meant) if meant else []:
                        found.broken[index] = f"{wrong[0]!r} ran, but should be {' or '.join(sorted(meant))}"
                except Exception as error:
                    note_failure(found, index, error)
            strays.settle()
    collect(found, got, cases, tensors.batch.case, arenas)
    return found


_TOGETHER: Final = 16
"""Calls whose comparisons are waited for together: other processes may be waiting for the GPU, too."""


class _Strays:
    """Finds the calls that wrote where nothing may be written.

    Args:
        found: gets them.
        watched: whether they are looked for.
    """

    def __init__(self, found: LayerResults, *, watched: bool) -> None:
        self._found, self._watched = found, watched
        self._runs: list[tuple[int, LayerRun]] = []
        self._flags: list[torch.Tensor] = []

    def add(self, index: int, run: LayerRun) -> None:
        """A call that is over."""
        if not self._watched:
            return
        if not observation.waited_for(run.x):
            self._note(index, run)
            return
        self._runs.append((index, run))
        self._flags += run.flags()
        if len(self._runs) == _TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Waits for what is there."""
        runs, flags, self._runs, self._flags = self._runs, self._flags, [], []
        if flags and torch.stack(flags).any():
            for index, run in runs:
                self._note(index, run)

    def _note(self, index: int, run: LayerRun) -> None:
        if strays := run.strays():
            stray = strays[0]
            self._found.strayed[index] = f"the {stray.step} changed rows {list(stray.rows)[:8]} of {stray.tensor}"


def _through(run: LayerRun, poison: str, *, interfered: bool) -> None:
    """All micro-sequences forward, then backward in reverse, around another call where one is wanted."""
    case, device = run.case, run.tensors.device
    other = interfering_call(case, run.backend, device.type) if interfered else None
    inputs = layer_inputs(other, device) if other is not None else None

    def made(each: Case) -> LayerRun:
        assert inputs is not None
        return LayerRun(run.backend, each, LayerTensors.of_one(each, inputs, device, poison), watched=False)

    for _ in around(other, made, crossed=crossing(case)):
        run.forward()
    run.backward()


def arenas_of(cases: Sequence[Case], case: Case, weights: Mapping[str, torch.Tensor]) -> Arenas:
    """Memory for the results of calls, each of them a case, of a packed case with such weights."""
    heads = (case.kv_heads, case.head_dim)
    rows = {name: (case.hidden,) if name in _IN_CASE_DTYPE else heads for name in OF_TOKENS}
    shapes = {f"d_{name}": tuple(weight.shape) for name, weight in weights.items()}
    return Arenas([each.tokens for each in cases], rows, shapes, next(iter(weights.values())).device)


def collect(
    found: LayerResults, got: Sequence[dict[str, torch.Tensor]], cases: Sequence[Case], case: Case, arenas: Arenas
) -> None:
    """Puts the calls' results one behind another, zeros for what a call did not give.

    Args:
        found: gets them.
        got: what each call gave, on the device of the arenas.
        cases: each of the calls.
        case: all of them.
        arenas: where they may lie already.
    """
    there = [index for index in range(len(cases)) if index not in found.broken and index not in found.refused]
    shown = {name for name in _OPTIONAL if any(name in got[index] for index in there)}
    rows = {name: row for name, row in arenas.rows.items() if name not in _OPTIONAL or name in shown}
    wanted = {index: {name: (cases[index].tokens, *row) for name, row in rows.items()} for index in range(len(cases))}
    for shapes in wanted.values():
        shapes |= {name: tuple(shape) for name, shape in arenas.shapes.items()}
    for index in there:
        wrong = [name for name, shape in wanted[index].items() if not _fits(case, name, got[index].get(name), shape)]
        if wrong:
            found.broken[index] = f"{', '.join(wrong)}: missing, or of another shape or dtype"
            found.incomplete.add(index)
    right = {index for index in there if index not in found.broken}
    if not right:
        return
    for name in wanted[min(right)]:
        of_calls = [got[index][name] if index in right else None for index in range(len(cases))]
        whole = arenas.result(name, of_calls)
        if whole is None:
            dtype = got[min(right)][name].dtype
            each = [
                torch.zeros(wanted[index][name], dtype=dtype, device=arenas.device) if x is None else x.to(dtype)
                for index, x in enumerate(of_calls)
            ]
            whole = torch.cat(each) if name in rows else torch.stack(each)
        found.results[name] = whole


def _fits(case: Case, name: str, got: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a result is there, as it should be: buffers and parameters' gradients may be float32."""
    if got is None or tuple(got.shape) != shape:
        return False
    return got.dtype == DTYPES[case.dtype] or (name not in _IN_CASE_DTYPE and got.dtype == torch.float32)
