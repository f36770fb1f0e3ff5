"""Scripts of layers from outside: one sequence, several in a row, or one over ranks.

The script has the user's class by its file, the layer written plainly in float64, and what each element may differ by.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import torch

from attn_fuzz.backends.layer_arguments import taken_apart
from attn_fuzz.backends.registry import USER_LAYER, Backend
from attn_fuzz.backends.user_rank_layer import TENSOR_GROUP, keywords_of
from attn_fuzz.cases.earlier import earlier_sequence
from attn_fuzz.execution.reused import EarlierFailed, ReusedRun
from attn_fuzz.execution.runner import LayerRuns
from attn_fuzz.findings.scripts.text import (
    MAX_ELEMENTS,
    SECONDS,
    About,
    Asked,
    ScriptError,
    allowances,
    filled,
    numbers,
    source,
)
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.trial import SECOND_SEED, Trial
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.conventions import Conventions
from attn_fuzz.reference.layer import LayerInputs, layer_answer
from attn_fuzz.reference.monte_carlo import CONFIRMING_SAMPLES
from attn_fuzz.reference.weights import NORM_EPSILON

_LAYOUT: Final = ("lengths", "packed_lengths", "packed_key_lengths", "packed_ids", "document_ids", "tokens", "padding")
_OF_SEQUENCE: Final = (*_LAYOUT, "cuts", "padding_ids", "padding_spans")
"""What the layer is told of one sequence only."""
_DERIVED: Final = ("all_ranks", "softmax_scale", "effective_window")
_VALUES: Final = frozenset({"values of x", "values of dout"})
"""What an observation says of inputs that changed, margins apart."""
_OF_PADDING: Final = ("out", "dx", "k", "v", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Plain:
    """What the layer in the script does, and what of it is compared."""

    norms: bool
    rotary: bool
    shared: bool
    theta: float
    turned: int | None
    """How many channel pairs rotary turns; None for all."""
    packed: bool
    """Whether positions are those in the packed sequence."""
    uncomputed: bool
    """Whether rows of padding have no gradient."""
    backward: bool
    kept: bool
    """Whether gradient rows stay what they are."""
    epsilon: float = NORM_EPSILON

    @property
    def within(self) -> str:
        """What positions are counted in, in words."""
        return "the packed sequence" if self.packed else "each document"

    @classmethod
    def of(cls, case: Case, conventions: Conventions, *, backward: bool) -> Plain:
        """Of a layer case, and what the layer declares."""
        pairs = math.ceil(case.rotary_fraction * (case.head_dim // 2))
        return cls(
            norms={case.query_norm, case.key_norm, case.value_norm} != {"none"},
            rotary=case.rotary != "none",
            shared=case.shared_key_value,
            theta=case.rotary_theta,
            turned=pairs if case.rotary == "proportional" else None,
            packed=conventions.rotary_positions == "packed",
            uncomputed=bool(case.padding_spans) and not conventions.computes_padding,
            backward=backward,
            kept=conventions.gradient_rows == "kept",
        )


def _load(backend: Backend) -> tuple[str, str, bool]:
    """(what loads the class, its further arguments, whether it is a file) as source text."""
    bare, arguments = taken_apart(backend.name.removeprefix(USER_LAYER))
    where, _, name = bare.rpartition(":")
    file = where.endswith(".py")
    load = (
        f"Layer = runpy.run_path({source(where)})[{source(name)}]" if file else f"from {where} import {name} as Layer"
    )
    return load, "".join(f", {key}={source(value)}" for key, value in sorted(arguments.items())), file


def _settings(case: Case) -> list[str]:
    """Everything that a case says but for its documents, as arguments of a call, in lines."""
    names = [field.name for field in dataclasses.fields(Case) if field.name not in _OF_SEQUENCE]
    told = [f"{name}={source(getattr(case, name))}" for name in (*names, *_DERIVED)]
    return textwrap.wrap(", ".join(told) + ",", 112, break_long_words=False)


def _answer(trial: Trial, *, fatal: bool) -> dict[str, Expected]:
    """What should come out, with careful budgets; of what is not to be run here, as if it showed everything."""
    if not fatal:
        return {name: each for name, each in trial.careful_answer.items() if name in trial.observations[0].results}
    assert isinstance(trial.inputs, LayerInputs)
    conventions = trial.stated.conventions
    return layer_answer(trial.case, trial.inputs, trial.profile, CONFIRMING_SAMPLES, conventions=conventions)


def _call(trial: Trial, answer: Mapping[str, Expected]) -> dict[str, Any]:
    """One sequence, as source text."""
    case, inputs = trial.case, trial.inputs
    assert isinstance(inputs, LayerInputs)
    if 2 * inputs.x.numel() + sum(weight.numel() for weight in inputs.weights.values()) > MAX_ELEMENTS:
        raise ScriptError(f"the case has more than {MAX_ELEMENTS} numbers; shrink it first")
    allowed = {}
    for name, expected in answer.items():
        bound = limit(case) * expected.variance.sqrt()
        if name in _OF_PADDING and not trial.stated.conventions.computes_padding:
            for begin, end in case.padding_spans:
                bound[begin:end] = torch.inf
        allowed[name] = allowances(bound)
    shape = f", {case.tokens}, {case.hidden}"
    return {
        "layout": ", ".join(f"{name}={getattr(case, name)!r}" for name in _OF_SEQUENCE),
        "x": numbers(inputs.x) + shape,
        "dout": numbers(inputs.dout) + shape,
        "allowed": allowed,
    }


def _beyond(trial: Trial) -> bool:
    """Whether an element is beyond its budget, as the script compares them."""
    results = trial.observations[0].results
    pairs = ((results.get(name), expected) for name, expected in trial.careful_answer.items())
    return any(
        bool((deviations(trial.case, got, expected) > limit(trial.case)).any())
        for got, expected in pairs
        if got is not None and got.shape == expected.value.shape
    )


def _alone(case: Case, backend: Backend, device: torch.device) -> tuple[Trial, bool]:
    """The first values by which a sequence is seen to fail, and whether by changed inputs."""
    changed = None
    for seed in (case.seed, case.seed ^ SECOND_SEED):
        trial = Trial(case.replace(seed=seed), backend, device, ("nan",), interfered=False)
        if _beyond(trial):
            return trial, False
        if changed is None and case.all_ranks == 1 and set(trial.observations[0].changed) & _VALUES:
            changed = trial
    if changed is None:
        raise ScriptError("no sequence by itself shows this by a wrong element; use replay")
    return changed, True


def _filled(
    trials: Sequence[Trial],
    about: About,
    *,
    index: int = 0,
    fatal: bool = False,
    changes: bool = False,
    reused: bool = False,
) -> str:
    first, case = trials[0], trials[index].case
    assert isinstance(first.inputs, LayerInputs)
    load, arguments, file = _load(first.backend)
    tensor = TENSOR_GROUP in keywords_of(first.stated)
    values = {
        "about": about,
        "asked": Asked.of(case, first.device),
        "plain": Plain.of(case, first.stated.conventions, backward=first.stated.backward),
        "load": load,
        "arguments": arguments,
        "runs_file": file,
        "settings": _settings(case),
        "weights": {
            name: numbers(weight) + "".join(f", {size}" for size in weight.shape)
            for name, weight in first.inputs.weights.items()
        },
        "calls": [_call(trial, _answer(trial, fatal=fatal)) for trial in trials],
        "index": index,
        "ranks": case.all_ranks,
        "tensor_ranks": case.tensor_ranks if tensor else 0,
        "seconds": SECONDS[first.device.type],
        "fatal": fatal,
        "changes": changes,
        "reused": reused,
    }
    return filled("ranks.py" if case.all_ranks > 1 else "layer.py", values)


def layer_script(case: Case, backend: Backend, device: torch.device, about: About, *, fatal: bool = False) -> str:
    """The script of a sequence that fails by itself, on one process or over ranks.

    Args:
        case: a layer case.
        backend: a user's layer that fails it.
        device: where.
        about: its head.
        fatal: the case raises, ends its process or hangs, so that it is not run here.

    Raises:
        ScriptError: when it is too large, or fails in a way that no element of such a run shows.
    """
    if fatal:
        return _filled([Trial(case, backend, device, ("nan",), interfered=False)], about, fatal=True)
    trial, changes = _alone(case, backend, device)
    return _filled([trial], about, changes=changes)


def layer_calls_script(calls: Sequence[Case], index: int, backend: Backend, device: torch.device, about: About) -> str:
    """The script of sequences in a row, each through a layer of its own.

    Args:
        calls: layer cases that differ in their documents and cuts only.
        index: the one that fails.
        backend: a user's layer that fails it.
        device: where.
        about: its head.

    Raises:
        ScriptError: when they are too large, or no element of theirs is wrong here.
    """
    # Twice: the first time other calls may have come before.
    for _ in range(2):
        trials = [Trial(case, backend, device, ("nan",), interfered=False) for case in calls]
        # Before any budget, which takes no run, and so in the order of the script.
        _ = [trial.observations for trial in trials]
    if not any(map(_beyond, trials)):
        raise ScriptError("made one after another, these calls give no wrong element; use replay")
    return _filled(trials, about, index=index)


@dataclasses.dataclass
class _Reused(Trial):
    """A case that is the second sequence of its object."""

    how: ClassVar[LayerRuns] = ReusedRun


def reused_layer_script(case: Case, backend: Backend, device: torch.device, about: About) -> str:
    """The script of a sequence that fails as the second one of its object, with the one before.

    Args:
        case: a layer case.
        backend: a user's layer that declares that it is reusable.
        device: where.
        about: its head.

    Raises:
        ScriptError: when it is too large, or no element of the second sequence is wrong.
    """
    for seed in (case.seed, case.seed ^ SECOND_SEED):
        second = _Reused(case.replace(seed=seed), backend, device, ("nan",), interfered=False)
        try:
            fails = _beyond(second)
        except EarlierFailed:
            break
        if fails:
            first = Trial(earlier_sequence(second.case), backend, device, ("nan",), interfered=False)
            assert isinstance(first.inputs, LayerInputs)
            assert isinstance(second.inputs, LayerInputs)
            # An object keeps its weights.
            first.inputs = dataclasses.replace(first.inputs, weights=second.inputs.weights)
            return _filled([first, second], about, index=1, reused=True)
    raise ScriptError("no second sequence through one object shows this by a wrong element; use replay")
