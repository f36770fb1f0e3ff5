"""``torch.compile`` around a call, or around a module with it: what it gives by itself, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_fuzz.execution.compiled_call import GENERATED, TRACED, CompiledCall, NotTraceable, generates
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.runner import KernelCall
from attn_fuzz.oracle.relations.launched import unlike
from attn_fuzz.oracle.symptoms import NotCompiled, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs

COMPILED: Final = "calls compiled by torch"
REFUSED: Final = "not taken by torch.compile"

_ENOUGH: Final = 2
"""Calls that torch's compiler did not take, after which a backend is asked no more in this process."""

_failed: dict[tuple[str, str], list[str]] = {}
"""Why it did not, by backend and device."""


def compiled_alike(trial: Trial) -> Iterator[Symptom]:
    """Around the call or in a module, by torch's compiler with and without code of its own, in turn by the seed."""
    case, stated = trial.case, trial.stated
    # What torch compiles by itself would have to be compiled anew afterwards.
    compiles = trial.backend.kernel.compiled or stated.compiles or stated.configurations
    if case.level != "kernel" or compiles or stated.traceable is False:
        return
    failed = _failed.setdefault((trial.backend.name, str(trial.device)), [])
    module, generated = bool(case.seed & 1), bool(case.seed & 2) and generates(trial.device)

    def once() -> Observation:
        return _run(trial, module=module, compiler=GENERATED if generated else TRACED)

    if len(failed) < _ENOUGH:
        try:
            got = once()
        except NotTraceable as refusal:
            failed.append(str(refusal))
        else:
            trial.counted[COMPILED] += 1
            where = f"{'in a module ' if module else ''}compiled by torch ({GENERATED if generated else TRACED})"
            # What stands before it in a module may lay its inputs out otherwise, which may round otherwise.
            usual = _run(trial, module=True, compiler=None) if module else trial.observations[-1]
            # Code of its own may keep in float32 what a kernel written in Python rounds.
            exact = not generated and not _multiplies(trial)
            for tensor, words, z, element in unlike(trial, usual, got, once, exact=exact):
                yield NotCompiled("compiled", tensor, f"{where}: {words}", z=z, element=element)
            return
    if stated.traceable:
        yield NotCompiled("compiled", "call", f"torch.compile does not take it: {failed[-1]}")
    else:
        trial.counted[f"{REFUSED} ({failed[-1]})"] += 1


class _Products(TorchDispatchMode):
    """Notes whether matrices are multiplied."""

    seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= function.overloadpacket in _MULTIPLY
        return function(*args, **(kwargs or {}))


_MULTIPLY: Final = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)


def _multiplies(trial: Trial) -> bool:
    """Whether a call is put together of products of matrices, which libraries take in an order by how operands lie.

    Torch's compiler may lay them out otherwise: seen of dK in float32 on a CPU, the last bit of one element.
    """
    assert isinstance(trial.inputs, Inputs)
    call = KernelCall(trial.backend, trial.case, trial.inputs, trial.poisons[0], trial.device)
    with _Products() as products:
        call.forward()
    return products.seen


def _run(trial: Trial, *, module: bool, compiler: str | None) -> Observation:
    assert isinstance(trial.inputs, Inputs)
    call = CompiledCall(trial.backend, trial.case, trial.inputs, trial.poisons[0], trial.device)
    call.module, call.compiler = module, compiler
    call.forward()
    call.backward()
    return call.observe()
