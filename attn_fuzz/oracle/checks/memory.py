"""Memory: what is handed out unwritten is not read, what is handed in is not written, results are all there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from attn_fuzz.execution.inferred import promises
from attn_fuzz.execution.observation import Observation, differing
from attn_fuzz.oracle.checks.budget import place_of
from attn_fuzz.oracle.symptoms import (
    Element,
    InputsChanged,
    MissingResult,
    NotRepeatable,
    Place,
    PoisonLeaked,
    Symptom,
    WroteOutside,
)
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.memory import bits, same_bits
from attn_fuzz.reference.values import DTYPES

_IN_CASE_DTYPE = ("out", "dq", "dx")


def results_complete(trial: Trial) -> Iterator[Symptom]:
    """Results are there in both runs, with shape and dtype; only the LSE and a layer's buffers may be absent."""
    optional = {"lse"} if trial.case.level == "kernel" else {"k", "v", "dk", "dv"}
    dtype = DTYPES[trial.case.dtype]
    for name, expected in trial.answer.items():
        found = [observation.results.get(name) for observation in trial.observations]
        present = [got for got in found if got is not None]
        if len(present) < len(found) and (present or name not in optional):
            yield MissingResult("complete", name, "there is no such result")
        for got in present[:1]:
            if got.shape != expected.value.shape:
                wanted = list(expected.value.shape)
                yield MissingResult("complete", name, f"its shape is {list(got.shape)}, but should be {wanted}")
            # Buffers and parameter gradients may be kept in a wider dtype.
            elif got.dtype != dtype and (name in _IN_CASE_DTYPE or got.dtype != torch.float32):
                yield MissingResult("complete", name, f"its dtype is {got.dtype}, but should be {dtype}")


def unwritten_unread(trial: Trial) -> Iterator[Symptom]:
    """NaN poison comes out nowhere, and where the backend repeats itself both poisons give the same bits."""
    by_poison = {observation.poison: observation for observation in trial.observations}
    if (nan_run := by_poison.get("nan")) is not None:
        for name, got in nan_run.results.items():
            expected = trial.answer.get(name)
            if expected is None or got.shape != expected.value.shape or not got.isnan().any():
                continue
            leaked = _leaked(trial, name, got.isnan() & ~expected.value.isnan())
            if not leaked.any():
                continue
            rows = leaked.reshape(len(leaked), -1).any(1).nonzero()[:, 0].tolist()
            expects = expected.value[leaked][0].item()
            document, row = trial.document_of(name, rows[0])
            where = f"row {row}" if document is None else f"document {document}, row {row}"
            yield PoisonLeaked(
                "unwritten",
                name,
                f"{where} is NaN where unwritten memory is, and a number where that holds numbers: {int(leaked.sum())} "
                f"elements in {len(rows)} rows",
                element=Element(Place(document, row), math.nan, expects),
            )
    if len(trial.observations) == 2:
        second = trial.observations[1].poison
        for name in differing(*trial.observations):
            if trial.observations[0].results[name].isnan().any() or not trial.repeats(name):
                continue
            if _by_poison(trial, name) and trial.moves_for(name, lambda: trial.observe(second)):
                yield PoisonLeaked(
                    "unwritten",
                    name,
                    "its bits change with the contents of memory that nothing has written",
                    element=first_difference(trial, name, *trial.observations),
                )
            elif promises(trial.backend, str(trial.device), name):
                yield NotRepeatable(
                    "repeatable",
                    name,
                    "two runs of the same call gave other bits, and not for what memory held",
                    element=first_difference(trial, name, *trial.observations),
                )


def first_difference(trial: Trial, name: str, first: Observation, second: Observation) -> Element | None:
    """The first element that has other bits in a second run: what came out there, and what in the first one."""
    before, after = (run.results[name] for run in (first, second))
    if before.shape != after.shape or before.dtype != after.dtype:
        return None
    at = int((bits(before) != bits(after)).flatten().nonzero()[0])
    place = place_of(trial, name, at, before.shape)
    return Element(place, after.flatten()[at].item(), before.flatten()[at].item())


def _leaked(trial: Trial, name: str, found: torch.Tensor) -> torch.Tensor:
    """Those elements whose NaN comes out of unwritten memory: with other contents they are none.

    NaN that is there whatever unwritten memory holds is arithmetic, and NaN that a run by itself does not show is an
    interfering call's doing; both are left to the checks of the numbers.
    """
    found = found & _nan_under(trial, "nan", name, found)
    numbers = found & ~_nan_under(trial, "finite", name, found)
    # Unwritten memory that is large may overflow on its way out; zeros do not.
    return numbers if numbers.any() else found & ~_nan_under(trial, "zero", name, found)


def _nan_under(trial: Trial, poison: str, name: str, found: torch.Tensor) -> torch.Tensor:
    """Where a result is NaN in a run by itself under a poison, as far as anybody asks."""
    if not found.any():
        return found
    alone = [run for run in trial.observations[1:] if run.poison == poison]
    got = (alone[0] if alone else trial.observe(poison)).results.get(name)
    return got.isnan() if got is not None and got.shape == found.shape else torch.zeros_like(found)


def _by_poison(trial: Trial, name: str) -> bool:
    """Whether it is the poison, and neither chance nor the interfering call, that decides the bits."""
    first, second = trial.observations
    again = trial.observe(first.poison)
    return same_bits(again.results[name], first.results[name]) and same_bits(
        trial.observe(second.poison).results[name], second.results[name]
    )


def inputs_intact(trial: Trial) -> Iterator[Symptom]:
    """Inputs, weights, metadata and the guard margins around them keep their bits."""
    for what in dict.fromkeys(what for observation in trial.observations for what in observation.changed):
        yield InputsChanged("inputs_intact", what, "its bits changed")


def results_kept(trial: Trial) -> Iterator[Symptom]:
    """What a layer has handed back stays as it is: whoever has it may need it until the backward is over."""
    for observation in trial.observations:
        for stray in observation.strays:
            if stray.tensor in ("out", "dx"):
                yield WroteOutside(
                    "results_kept",
                    stray.tensor,
                    f"rows {list(stray.rows)[:8]} of what the {stray.step} handed back became {stray.value:.6g} "
                    "afterwards: it is memory that later steps, or another sequence, write to",
                )


def buffer_intact(trial: Trial) -> Iterator[Symptom]:
    """A forward writes its own slice of the K/V buffer and no other row."""
    for observation in trial.observations:
        for stray in observation.strays:
            if stray.tensor in ("k", "v"):
                yield WroteOutside(
                    "buffer_intact",
                    stray.tensor,
                    f"the {stray.step} changed rows {list(stray.rows)[:8]} outside its slice, to {stray.value:.6g}",
                )
