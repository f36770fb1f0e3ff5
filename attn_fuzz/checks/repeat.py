"""Order and repetition: the same case after others gives the same bits; the path taken is the one meant."""

from __future__ import annotations

from collections.abc import Iterator

from attn_fuzz.observation import differing
from attn_fuzz.symptoms import NotRepeatable, Symptom, WrongPath
from attn_fuzz.trial import Trial


def repeats_itself(trial: Trial) -> Iterator[Symptom]:
    """A, then other calls (decoy, poisons, probes), then A again: the bits of the first time."""
    first = trial.observations[0]
    again = trial.observe(first.poison)
    for name in differing(first, again):
        if trial.repeats(name):
            yield NotRepeatable(
                "repeatable", name, "the same call gave other bits than the first time, after others in between"
            )


def path_taken(trial: Trial) -> Iterator[Symptom]:
    """Nothing fell back silently: the implementation that ran is one that the backend names."""
    named = trial.backend.kernel.paths_on(trial.device.type)
    for observation in trial.observations[:1]:
        for path in sorted(observation.paths - named) if named else ():
            yield WrongPath("path", "out", f"{path!r} ran, but should be {' or '.join(sorted(named))}")
