"""Other lives of a layer's object, where it declares them: a second sequence, and evaluation without autograd.

The runs are others, what is asked of them is the same: every check of the runs that each case makes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.cases.earlier import earlier_sequence
from attn_fuzz.execution.layer_conventions import EVALUATED, without_autograd
from attn_fuzz.execution.process import beyond_its_call, in_words
from attn_fuzz.execution.reused import EarlierFailed, ReusedRun
from attn_fuzz.execution.runner import LayerRun, LayerRuns, require_support
from attn_fuzz.oracle.checks.budget import within_budget
from attn_fuzz.oracle.checks.dead_rows import dead_rows_zero
from attn_fuzz.oracle.checks.memory import (
    buffer_intact,
    results_complete,
    results_kept,
    unwritten_unread,
)
from attn_fuzz.oracle.symptoms import KeepsState, Symptom, WrongWhenAsked
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.profile import Profile

_ASKED = (
    results_complete,
    unwritten_unread,
    dead_rows_zero,
    buffer_intact,
    results_kept,
    within_budget,
)


@dataclasses.dataclass
class _Reused(Trial):
    """A case that is the second sequence of its object."""

    how: ClassVar[LayerRuns] = ReusedRun


@dataclasses.dataclass
class _Evaluated(Trial):
    """A case whose layer is run without autograd, forward only."""

    how: ClassVar[LayerRuns] = functools.partial(LayerRun, evaluation=True)

    def answer_under(self, profile: Profile, samples: int) -> dict[str, Expected]:
        answer = super().answer_under(profile, samples)
        return {name: answer[name] for name in EVALUATED}


def _made(trial: Trial, how: type[Trial]) -> Trial:
    """The same case in another life, by itself."""
    given: dict[str, Any] = {
        field.name: getattr(trial, field.name) for field in dataclasses.fields(Trial) if field.init
    }
    return how(**{**given, "interfered": False})


def _symptoms(trial: Trial) -> Iterator[Symptom]:
    for check in _ASKED:
        yield from check(trial)


def second_sequence(trial: Trial) -> Iterator[Symptom]:
    """A sequence through an object that another one has gone through: as right as through a new one."""
    case = trial.case
    if case.level != "layer" or case.all_ranks > 1 or not trial.stated.reusable:
        return
    earlier = earlier_sequence(case)
    what = f"in a second sequence of one object, after one of documents {list(earlier.lengths)}"
    try:
        require_support(trial.backend, earlier, trial.device)
        for symptom in _symptoms(_made(trial, _Reused)):
            message = f"{what}: {symptom.message}"
            yield KeepsState("second_sequence", symptom.tensor, message, z=symptom.z, element=symptom.element)
    except (UnsupportedCase, EarlierFailed):
        return
    except Exception as error:
        if beyond_its_call(error):
            raise
        yield KeepsState("second_sequence", "call", f"{what}: {in_words(error)}")


def evaluated(trial: Trial) -> Iterator[Symptom]:
    """Without autograd, as in evaluation, a layer that does that gives the same output."""
    if (
        trial.case.level != "layer"
        or trial.case.all_ranks > 1
        or not (trial.stated.evaluation and trial.stated.backward)
    ):
        return
    how = f"under torch.{type(without_autograd(trial.case)).__name__}()"
    try:
        for symptom in _symptoms(_made(trial, _Evaluated)):
            message = f"{how}: {symptom.message}"
            yield WrongWhenAsked("evaluated", symptom.tensor, message, z=symptom.z, element=symptom.element)
    except UnsupportedCase:
        return
    except Exception as error:
        if beyond_its_call(error):
            raise
        yield WrongWhenAsked("evaluated", "call", f"{how}: {in_words(error)}")
