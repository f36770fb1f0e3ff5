"""``torch.compile`` around a call, or around a module with it: what it gives by itself, to the bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.interfering import another_layout
from attn_fuzz.execution.calls import Call
from attn_fuzz.execution.compiled_call import GENERATED, TRACED, Compiled, NotTraceable, generates
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.process import beyond_its_call
from attn_fuzz.execution.runner import KernelCall
from attn_fuzz.oracle.relations.launched import unlike
from attn_fuzz.oracle.symptoms import NotCompiled, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs, kernel_inputs
from attn_fuzz.reference.case import Case

COMPILED: Final = "calls compiled by torch"
REFUSED: Final = "not taken by torch.compile"
AS_IT_IS: Final = "it runs as it is"

_ENOUGH: Final = 2
"""Calls that torch's compiler did not take, after which a backend is asked no more in this process."""

_failed: dict[tuple[str, str], list[str]] = {}
"""Why it did not, by backend and device."""


@dataclasses.dataclass(frozen=True)
class Way:
    """In which way calls are compiled."""

    module: bool
    """As part of a module."""
    generated: bool
    """With code of the compiler's own."""

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Way:
        """By turns, by bits of the seed that the second value seed leaves as they are."""
        return cls(bool(case.seed & 2), bool(case.seed & 4) and generates(device))

    @property
    def words(self) -> str:
        """The same in words."""
        return f"{'in a module ' if self.module else ''}compiled by torch ({GENERATED if self.generated else TRACED})"

    def compiled(self, backend: Backend, *, any_sizes: bool = False) -> Compiled:
        """Nothing yet, for any calls of a backend to come (``Compiled``)."""
        compiler = GENERATED if self.generated else TRACED
        return Compiled(backend, module=self.module, compiler=compiler, any_sizes=any_sizes)

    def as_it_is(self, backend: Backend) -> Compiled:
        """The same not compiled: a module may lay inputs out otherwise, and these round otherwise."""
        return Compiled(backend, module=self.module, compiler=None)


def compilable(backend: Backend, device: torch.device) -> bool:
    """Whether torch's compiler may be asked to take calls: what torch compiles by itself would be compiled anew.

    What compiles for shapes has met those of its layouts.
    """
    stated = backend.kernel.capabilities_on(device.type)
    compiles = (stated.compiles or stated.configurations) and not stated.layouts
    return not (backend.kernel.compiled or compiles) and stated.traceable is not False


def refusals(backend: Backend, device: torch.device) -> list[str]:
    """Why torch's compiler did not take calls so far, in this process; the list itself, to be added to."""
    return _failed.setdefault((backend.name, str(device)), [])


def given_up(backend: Backend, device: torch.device) -> bool:
    """Whether it was asked often enough."""
    return len(refusals(backend, device)) >= _ENOUGH


def compiled_alike(trial: Trial) -> Iterator[Symptom]:
    """Around the call or in a module, by torch's compiler with and without code of its own, in turn by the seed; after
    a call of another layout, and by every other seed for its own sizes before."""
    case, backend, device = trial.case, trial.backend, trial.device
    if case.level != "kernel" or not compilable(backend, device):
        return
    failed, way = refusals(backend, device), Way.of(case, device)
    if not given_up(backend, device):
        found: list[Symptom] = []
        try:
            for reused in (False, True) if case.seed & 1 else (True,):
                ran, found = _asked(trial, way, reused=reused)
                if found:
                    break
        except NotTraceable as refusal:
            failed.append(str(refusal))
        else:
            trial.counted[COMPILED if ran else f"{REFUSED} ({AS_IT_IS})"] += 1
            yield from found
            return
    if trial.stated.traceable:
        yield NotCompiled("compiled", "call", f"torch.compile does not take it: {failed[-1]}")
    else:
        trial.counted[f"{REFUSED} ({failed[-1]})"] += 1


def _asked(trial: Trial, way: Way, *, reused: bool) -> tuple[bool, list[Symptom]]:
    """(whether anything of the case's call ran compiled, what it then gave that it does not give as it is)."""
    made = functools.partial(_reused, trial, way) if reused else functools.partial(way.compiled, trial.backend)
    got, ran = _run(trial, made())
    usual = _run(trial, way.as_it_is(trial.backend))[0] if way.module else trial.observations[-1]
    # Code of its own may keep in float32 what a kernel written in Python rounds.
    exact = not way.generated and not multiplies(_call(trial, trial.case))
    wrong = unlike(trial, usual, got, lambda: _run(trial, made())[0], exact=exact)
    return ran, [
        NotCompiled("compiled", tensor, f"{way.words}: {words}", z=z, element=element)
        for tensor, words, z, element in wrong
    ]


class _Products(TorchDispatchMode):
    """Notes whether matrices are multiplied."""

    seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= function.overloadpacket in _MULTIPLY
        return function(*args, **(kwargs or {}))


_MULTIPLY: Final = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)


def multiplies(call: Call) -> bool:
    """Whether a call is put together of products of matrices, which libraries take in an order by how operands lie.

    Torch's compiler may lay them out otherwise: seen of dK in float32 on a CPU, the last bit of one element.

    Args:
        call: a new one; its forward is run.
    """
    with _Products() as products:
        call.forward()
    return products.seen


def _call(trial: Trial, case: Case) -> KernelCall:
    inputs = trial.inputs if case == trial.case else kernel_inputs(case, "cpu")
    assert isinstance(inputs, Inputs)
    return KernelCall(trial.backend, case, inputs, trial.poisons[0], trial.device)


def _run(trial: Trial, compiled: Compiled) -> tuple[Observation, bool]:
    """(what the case's call gives inside what is compiled, whether any of it was)."""
    call = _call(trial, trial.case)
    ran = compiled.run(call)
    return call.observe(), ran


def _reused(trial: Trial, way: Way) -> Compiled:
    """What is compiled for any sizes has had a call of another layout: what it kept of that one shows in the next."""
    compiled = way.compiled(trial.backend, any_sizes=True)
    other = another_layout(trial.case, trial.backend, trial.device.type)
    if other is not None:
        try:
            compiled.run(_call(trial, other))
        except NotTraceable:
            raise
        except Exception as error:
            # A case of its own, some other time.
            if beyond_its_call(error):
                raise
    return compiled
