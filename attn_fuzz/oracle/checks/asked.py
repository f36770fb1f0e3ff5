"""Other ways to ask autograd (oracle/relations/autograd.py): the same budget holds, told in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_fuzz.execution.calls import Asked
from attn_fuzz.oracle.checks.budget import place_of
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.relations.autograd import INFERENCE, TWICE, some_gradients
from attn_fuzz.oracle.symptoms import Element, Symptom, WrongWhenAsked
from attn_fuzz.oracle.trial import Trial


def asked_otherwise(trial: Trial) -> Iterator[Symptom]:
    """Without autograd, with gradients for some inputs only, and by a second backward: the same budget holds."""
    case = trial.case
    if case.level != "kernel" or trial.backend.kernel.compiled:
        # What is compiled would be compiled once more for each way to ask.
        return
    # Inference always, which is what a kernel is for; of the others one per case.
    yield from _judged(trial, "without autograd", INFERENCE)
    yield from _judged(trial, *some_gradients(case))
    yield from _judged(trial, "by a second backward over the same graph", TWICE)


def _judged(trial: Trial, how: str, asked: Asked) -> Iterator[Symptom]:
    """Results beyond their budget, on two value seeds of the same layout."""
    wrong = _beyond(trial, how, asked)
    if not wrong:
        return
    again = _beyond(trial.second, how, asked)
    for name, symptom in wrong.items():
        if name in again:
            yield symptom


def _beyond(trial: Trial, how: str, asked: Asked) -> dict[str, WrongWhenAsked]:
    """What is wrong with results, by name; not those that are so when everything is asked for."""
    observed = trial.observe_with(trial.inputs, trial.poisons[0], asked=asked)
    found: dict[str, WrongWhenAsked] = {}
    if observed.spent:
        return found
    for name in ("out", "lse", *(f"d{name}" for name in asked.gradients)):
        usual, got = trial.observations[0].results.get(name), observed.results.get(name)
        if (symptom := _off(trial, how, name, got)) is not None and _off(trial, how, name, usual) is None:
            found[name] = symptom
    return found


def _off(trial: Trial, how: str, name: str, got: torch.Tensor | None) -> WrongWhenAsked | None:
    """What is wrong with a result, or None."""
    expected = trial.answer[name]
    if got is None or got.shape != expected.value.shape:
        missing = f"{how}, it is missing, or has another shape"
        return None if name == "lse" else WrongWhenAsked("asked", name, missing)
    z = deviations(trial.case, got, expected)
    if not z.numel() or not z.max() > limit(trial.case):
        return None
    worst = int(z.argmax())
    came, should = (x.flatten()[worst].item() for x in (got, expected.value))
    element = Element(place_of(trial, name, worst, z.shape), came, should)
    message = f"{how}, {element.place}: got {came:.6g}, expected {should:.6g}, z = {z.max().item():.3g}"
    return WrongWhenAsked("asked", name, message, z=z.max().item(), element=element)
