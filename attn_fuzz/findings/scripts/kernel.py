"""Scripts of kernel calls: one, or several in a row of which one fails after the others only.

The tensors are written out with their exact values and their places in memory; the reference in the file computes
attention in float64, and every element is allowed the error that its budget allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import UserKernel
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.runner import KernelCall, run_kernel
from attn_fuzz.findings.scripts.text import (
    MAX_ELEMENTS,
    SECONDS,
    About,
    Asked,
    ScriptError,
    allowances,
    filled,
    listed,
    numbers,
    source,
)
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.known_answer.census import Census
from attn_fuzz.oracle.known_answer.every_row import EveryRow
from attn_fuzz.oracle.known_answer.needle import Needle
from attn_fuzz.reference.answer import Expected, Inputs, kernel_answer, kernel_inputs
from attn_fuzz.reference.case import FAR_MEMORIES, Case
from attn_fuzz.reference.far_memory import FarPlaced
from attn_fuzz.reference.memory import MARGIN, Placed
from attn_fuzz.reference.profile import Profile

_CONSTANTS: Final = {"softmax_scale": "SCALE", "causal": "CAUSAL", "window_size": "WINDOW", "softcap": "SOFTCAP"}
"""Of a script, by the options that kernels have for them."""

RESULTS: Final = ("out", "dq", "dk", "dv")
CROWD: Final = 1000
"""Documents; more are told as one, so many times, where all are as long and there are too many numbers otherwise."""

_MOST: Final = 1 << 20
"""Numbers of a tensor that are looked through for what repeats."""

_VALUES: Final = frozenset(f"values of {name}" for name in ("q", "k", "v", "dout"))
"""What an observation says of inputs that changed, margins apart."""

_OWN_KERNEL: Final = '''from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata

backend = registry.load({name!r})


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k{told}):
    """A backend of this project: run the script from a checkout."""
    lengths_q, lengths_k = {lengths}
    metadata = VarlenMetadata(lengths_q=lengths_q, lengths_k=lengths_k, device=torch.device(DEVICE){placed})
    options = AttentionOptions(scale=SCALE, causal=CAUSAL, window=WINDOW, softcap=SOFTCAP)
    return backend.kernel.attend(q, k, v, metadata, options){results}'''

_USER_KERNEL: Final = """{load}


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k{told}):
    out = function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {options})
    return {results}"""


def kernel_source(backend: Backend, case: Case, *, every: bool) -> str:
    """The call under test, as source text of a function ``kernel``, which gives the output, or that and the LSE.

    Args:
        backend: whose kernel.
        case: what it is asked for.
        every: with every argument, and not only with those that say something.
    """
    with_lse = case.lse_gradient
    if isinstance(backend.kernel, UserKernel):
        where, _, function = backend.name.rpartition(":")
        load = (
            f"function = runpy.run_path({source(where)})[{source(function)}]"
            if where.endswith(".py")
            else f"from {where} import {function} as function"
        )
        idle = {"window_size": case.window == (-1, -1), "softcap": case.softcap == 0}
        # As people write it; what raises may do so because of an argument that says nothing.
        asked = [name for name in backend.kernel.options if every or not idle.get(name)]
        told = backend.kernel.told_of_gaps(case.gaps)
        if len(told) < sum(gap > 0 for gap in case.gaps):
            raise ScriptError("the script has no prefix sums of padded lengths; use replay")
        options = ", ".join([f"{name}={_CONSTANTS[name]}" for name in asked] + [f"{name}={name}" for name in told])
        results = "out" if with_lse else "out[0] if isinstance(out, tuple) else out"
        return _USER_KERNEL.format(load=load, options=options, results=results, told=_SEQUSED if told else "")
    written = backend.kernel.lse_source if with_lse else backend.kernel.call_source
    return written or _own_kernel(backend, case)


_SEQUSED: Final = ", seqused_q=None, seqused_k=None"


def _own_kernel(backend: Backend, case: Case) -> str:
    """A call of a backend of this project."""
    lengths, placed = "(tuple(sums.diff().tolist()) for sums in (cu_seqlens_q, cu_seqlens_k))", ""
    if gapped := case.gaps != (0, 0):
        gaps = f"((cu_seqlens_q, {case.gaps[0]}), (cu_seqlens_k, {case.gaps[1]}))"
        lengths, placed = f"(tuple((sums.diff() - gap).tolist()) for sums, gap in {gaps})", f", gaps={case.gaps}"
    if case.loose_max_seqlen != (0, 0):
        placed += f", loose_max_seqlen={case.loose_max_seqlen}"
    return _OWN_KERNEL.format(
        name=backend.name,
        results="" if case.lse_gradient else ".out",
        lengths=lengths,
        placed=placed,
        told=_SEQUSED if gapped else "",
    )


def _crowd(case: Case) -> Case | None:
    """A document of a call of thousands that are all as long, and too many to be written out; None of other calls."""
    pairs = {*zip(case.packed_lengths, case.packed_key_lengths, strict=True)}
    if len(case.packed_lengths) <= CROWD or len(pairs) > 1:
        return None
    rows = sum(case.packed_lengths) * case.heads + sum(case.packed_key_lengths) * case.kv_heads
    return subset(case, [0]) if rows * (case.head_dim + case.value_dim) > MAX_ELEMENTS else None


def candidates(case: Case, profile: Profile) -> Iterator[Inputs]:
    """The case's own tensors, then those whose answers are known; of a crowd all documents have the first one's."""
    cpu = torch.device("cpu")
    if (one := _crowd(case)) is not None:
        times = len(case.packed_lengths)
        yield Inputs(**{name: _repeated(x, times) for name, x in kernel_inputs(one, cpu).named.items()})
        return
    yield kernel_inputs(case, cpu)
    if case.memory != "broadcast":
        for known in (Census, EveryRow, Needle):
            if (made := known.of(case, cpu, profile)) is not None:
                yield made.inputs


def _answer(case: Case, inputs: Inputs, backend: Backend, device: torch.device) -> dict[str, Expected]:
    """What should come out of a call."""
    if (one := _crowd(case)) is not None:
        own = _answer(one, kernel_inputs(one, "cpu"), backend, device)
        times = len(case.packed_lengths)
        # Rows come first in all of them.
        return {
            name: dataclasses.replace(
                each, value=_repeated(each.value, times), variance=_repeated(each.variance, times), degrees=None
            )
            for name, each in own.items()
        }
    return kernel_answer(case, inputs, backend.kernel.profile_on(device.type))


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    return x.repeat(times, *[1] * (x.dim() - 1))


def _wrong(case: Case, answer: dict[str, Expected], observation: Observation) -> bool:
    """Whether the script's own comparison sees it: an element beyond its budget, or something behind the documents."""
    results = observation.results
    beyond = [bool((deviations(case, results[name], answer[name]) > limit(case)).any()) for name in RESULTS]
    behind = any(bool((tail != 0).any()) for name, tail in observation.tails.items() if name in RESULTS)
    return any(beyond) or behind


def _alone(case: Case, backend: Backend, device: torch.device) -> tuple[Inputs, dict[str, Expected], bool]:
    """The first tensors by which a call is seen to fail, what should have come of them, and whether inputs changed."""
    changed: tuple[Inputs, dict[str, Expected], bool] | None = None
    for inputs in candidates(case, backend.kernel.profile_on(device.type)):
        observation, answer = run_kernel(backend, case, inputs, "nan", device), _answer(case, inputs, backend, device)
        if _wrong(case, answer, observation):
            return inputs, answer, False
        if changed is None and set(observation.changed) & _VALUES:
            changed = inputs, answer, True
    if changed is None:
        raise ScriptError("no single call shows this by a wrong element; use replay")
    return changed


def _call(case: Case, inputs: Inputs, answer: dict[str, Expected], backend: Backend, device: torch.device) -> Any:
    """One call's arguments, as source text."""
    placed = KernelCall(backend, case, inputs, "nan", device).placed
    rows = max(len(case.packed_lengths), *(item.storage.numel() for item in placed.values()))
    tensors = {name: _tensor(name, item) for name, item in placed.items()} if rows <= _MOST else {}
    if not tensors or sum(text.count(",") for text in tensors.values()) > MAX_ELEMENTS:
        raise ScriptError(f"the case has more than {MAX_ELEMENTS} numbers; shrink it first")
    bound = limit(case)
    return {
        "lengths_q": listed(case.packed_lengths),
        "lengths_k": listed(case.packed_key_lengths),
        "tensors": tensors,
        "room": max(item.tensor.untyped_storage().nbytes() // item.tensor.element_size() for item in placed.values()),
        "allowed": {name: allowances(bound * answer[name].variance.sqrt()) for name in RESULTS},
    }


def _most(case: Case) -> str:
    """The last arguments of a call, as source text."""
    queries, keys = (f" + {more}" if more else "" for more in case.loose_max_seqlen)
    return f"max(lengths_q){queries}, max(lengths_k){keys}{', **used' if case.gaps != (0, 0) else ''}"


def _used(case: Case) -> str:
    """How many rows each document has, on the sides that have gaps, as source text."""
    sides = [side for side, gap in zip("qk", case.gaps, strict=True) if gap]
    told = (f"seqused_{side}=torch.tensor(lengths_{side}, dtype=torch.int32, device=DEVICE)" for side in sides)
    return f"dict({', '.join(told)})"


def _tensor(name: str, item: Placed) -> str:
    """A tensor in its place, as source text."""
    place = f"{tuple(item.tensor.shape)}, {item.tensor.stride()}, {item.tensor.storage_offset()}"
    if isinstance(item, FarPlaced):
        return f"far({numbers(item.tensor.reshape(-1))}, {place})"
    return f"tensor({numbers(item.storage[MARGIN:-MARGIN])}, {place}{', torch.float32' if name == 'dlse' else ''})"


def _filled(about: About, backend: Backend, case: Case, device: torch.device, **more: Any) -> str:
    values: dict[str, Any] = {
        "about": about,
        "asked": Asked.of(case, device),
        "kernel": kernel_source(backend, case, every=bool(more.get("fatal"))),
        "runs_file": isinstance(backend.kernel, UserKernel) and backend.name.rpartition(":")[0].endswith(".py"),
        "margin": MARGIN,
        "capacity": case.capacity > 0,
        "gaps": case.gaps if case.gaps != (0, 0) else None,
        "loose": case.loose_max_seqlen if case.loose_max_seqlen != (0, 0) else None,
        "far": case.memory in FAR_MEMORIES,
        "most": _most(case),
        "used": _used(case),
        "own": "rows" if case.gaps != (0, 0) else ":rows",
        "lse": case.lse_gradient,
        "seconds": SECONDS[device.type],
        "fatal": False,
        "changes": False,
        "index": 0,
    }
    return filled("kernel.py", values | more)


def kernel_script(case: Case, backend: Backend, device: torch.device, about: About, *, fatal: bool = False) -> str:
    """The script of a call that fails by itself.

    Args:
        case: a kernel case.
        backend: that fails it.
        device: where.
        about: its head.
        fatal: the case ends its process or hangs, so that it is not run here; the script runs it in a child.

    Raises:
        ScriptError: when the case is too large, or fails in a way that one call does not show.
    """
    if fatal:
        inputs, changes = kernel_inputs(case, "cpu"), False
        answer = _answer(case, inputs, backend, device)
    else:
        inputs, answer, changes = _alone(case, backend, device)
    calls = [_call(case, inputs, answer, backend, device)]
    return _filled(about, backend, case, device, calls=calls, fatal=fatal, changes=changes)


def kernel_calls_script(calls: Sequence[Case], index: int, backend: Backend, device: torch.device, about: About) -> str:
    """The script of calls in a row.

    Args:
        calls: kernel cases that differ in their documents only.
        index: the one that fails.
        backend: that fails it.
        device: where.
        about: its head.

    Raises:
        ScriptError: when they are too large, or no element of theirs is wrong here.
    """
    if calls[index].memory in FAR_MEMORIES:
        raise ScriptError("calls whose rows lie far apart need gigabytes each; use replay")
    given = [kernel_inputs(case, "cpu") for case in calls]
    answers = [_answer(case, inputs, backend, device) for case, inputs in zip(calls, given, strict=True)]
    # Twice: the first time other calls may have come before.
    for _ in range(2):
        seen = [run_kernel(backend, case, inputs, "nan", device) for case, inputs in zip(calls, given, strict=True)]
    if not any(map(_wrong, calls, answers, seen)):
        raise ScriptError("made one after another, these calls give no wrong element; use replay")
    told = [_call(*each, backend, device) for each in zip(calls, given, answers, strict=True)]
    return _filled(about, backend, calls[index], device, calls=told, index=index)
