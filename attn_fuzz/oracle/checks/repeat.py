"""Order and repetition: the same case after others gives the same bits; the path taken is the one meant."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.cases.smaller import fewer_documents, one_shorter
from attn_fuzz.execution.observation import Observation, differing
from attn_fuzz.execution.process import beyond_its_call
from attn_fuzz.execution.runner import require_support
from attn_fuzz.oracle.checks.memory import first_difference
from attn_fuzz.oracle.symptoms import NotRepeatable, Symptom, WrongPath
from attn_fuzz.oracle.trial import Trial


def repeats_itself(trial: Trial) -> Iterator[Symptom]:
    """A, then B (a document less, or a shorter one), then A again: the bits of the first time."""
    first = trial.observations[0]

    def again() -> Observation:
        _run_smaller(trial)
        return trial.observe(first.poison)

    second = again()
    for name in differing(first, second):
        if trial.moves_for(name, again):
            yield NotRepeatable(
                "repeatable",
                name,
                "the same call gave other bits than the first time, after others in between",
                element=first_difference(trial, name, first, second),
            )


def _run_smaller(trial: Trial) -> None:
    """A call of another shape; what it does is judged when a case of its own is drawn."""
    for other in itertools.chain(fewer_documents(trial.case), one_shorter(trial.case)):
        if other is None or sum(other.packed_lengths) == sum(trial.case.packed_lengths):
            continue
        try:
            require_support(trial.backend, other, trial.device)
            dataclasses.replace(trial, case=other).observe(trial.poisons[0])
        except UnsupportedCase:
            continue
        except Exception as error:
            if beyond_its_call(error):
                raise
        return


def path_taken(trial: Trial) -> Iterator[Symptom]:
    """Nothing fell back silently: the implementation that ran is one that the backend names."""
    named = trial.backend.kernel.paths_on(trial.device.type)
    for observation in trial.observations[:1]:
        for path in sorted(observation.paths - named) if named else ():
            yield WrongPath("path", "out", f"{path!r} ran, but should be {' or '.join(sorted(named))}")
