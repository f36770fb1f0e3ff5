"""A finding as one Python file to paste into a report: needs torch and the backend, nothing of this project."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import InsideLayer
from attn_fuzz.findings.scripts.kernel import kernel_calls_script, kernel_script
from attn_fuzz.findings.scripts.layer import layer_calls_script, layer_script, reused_layer_script
from attn_fuzz.findings.scripts.text import About, ScriptError
from attn_fuzz.oracle.trial import SECOND_SEED
from attn_fuzz.reduction.call_sequence import CallSequence
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.layout import active_lengths, micro_sequences


def standalone(
    case: Case,
    backend: Backend,
    device: str,
    title: str,
    *,
    sequence: CallSequence | None = None,
    fatal: bool = False,
) -> str:
    """The text of the script.

    Args:
        case: that fails.
        backend: that fails it.
        device: where.
        title: what is wrong, in a line.
        sequence: calls in a row, where the case fails among them only.
        fatal: the case ends its process or hangs, so that it is not run here; its script does what the case does.

    Raises:
        ScriptError: when the case is too large, or fails in a way that no element of such calls shows.
    """
    place, about = torch.device(device), About.of(title, case, device)
    if sequence is not None:
        return _in_a_row(sequence.batch.calls, sequence.index, backend, place, about)
    try:
        return _by_itself(case, backend, place, about, fatal=fatal)
    except ScriptError:
        if fatal or case.all_ranks > 1:
            raise
        if case.level == "layer" and backend.kernel.capabilities_on(place.type).reusable:
            with contextlib.suppress(ScriptError):
                return reused_layer_script(case, backend, place, about)
        # What is kept from call to call by their shapes shows after another call of the same.
        for other in _of_the_same_shapes(case, backend, place):
            with contextlib.suppress(ScriptError):
                return _in_a_row((other, case), 1, backend, place, about)
        raise


def _by_itself(case: Case, backend: Backend, device: torch.device, about: About, *, fatal: bool) -> str:
    if case.level == "kernel":
        return kernel_script(case, backend, device, about, fatal=fatal)
    if isinstance(backend.kernel, InsideLayer):
        return layer_script(case, backend, device, about, fatal=fatal)
    return _inside(case, backend, device, about, fatal=fatal)


def _in_a_row(calls: Sequence[Case], index: int, backend: Backend, device: torch.device, about: About) -> str:
    if calls[0].level == "kernel":
        return kernel_calls_script(calls, index, backend, device, about)
    if isinstance(backend.kernel, InsideLayer):
        return layer_calls_script(calls, index, backend, device, about)
    inside = [call for each in calls for call in _kernel_calls(each, backend, device)]
    if not inside:
        raise ScriptError("it takes the layer of this project around the kernel; use replay")
    # Which of them it is that fails, of the last sequence or of an earlier one, their own lines tell.
    about = About.of(about.title, inside[-1], str(device))
    return kernel_calls_script(inside, len(inside) - 1, backend, device, about)


def _of_the_same_shapes(case: Case, backend: Backend, device: torch.device) -> Iterator[Case]:
    """Calls of other documents, or at least of other values, whose tensors have the same shapes."""
    seed = case.seed ^ SECOND_SEED
    turned: dict[str, object] = {"lengths": (*case.lengths[1:], case.lengths[0])}
    if case.key_lengths is not None:
        turned["key_lengths"] = (*case.key_lengths[2:], *case.key_lengths[:2])
    for changes in (turned, {}):
        with contextlib.suppress(CaseError):
            other = case.replace(seed=seed, **changes)
            if backend.refusal(other, device.type) is None:
                yield other


def _kernel_calls(case: Case, backend: Backend, device: torch.device) -> Iterator[Case]:
    """The calls that this project's layer makes of a kernel, as kernel cases; of what they take."""
    options = ("heads", "kv_heads", "head_dim", "causal", "window", "scale", "softcap", "dtype", "seed", "memory")
    for part in micro_sequences(case) if case.all_ranks == 1 else ():
        queries, keys = active_lengths(case.packed_lengths, part)
        call = Case(
            level="kernel", lengths=queries, key_lengths=keys, **{name: getattr(case, name) for name in options}
        )
        if backend.refusal(call, device.type) is None:
            yield call


def _inside(case: Case, backend: Backend, device: torch.device, about: About, *, fatal: bool) -> str:
    """Of a kernel inside this project's layer: the first of the layer's calls that fails by itself.

    Raises:
        ScriptError: when none does: then it is the layer that is wrong.
    """
    for call in _kernel_calls(case, backend, device) if not fatal else ():
        with contextlib.suppress(ScriptError):
            return kernel_script(call, backend, device, About.of(about.title, call, str(device)))
    raise ScriptError("it takes the layer of this project around the kernel; use replay")
