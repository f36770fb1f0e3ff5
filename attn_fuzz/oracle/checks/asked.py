"""Other ways to ask autograd (oracle/relations/autograd.py): the same budget holds, told in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_fuzz.execution.calls import Asked
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.relations.autograd import INFERENCE, TWICE, some_gradients
from attn_fuzz.oracle.symptoms import Symptom, WrongWhenAsked
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
    wrong = _beyond(trial, asked)
    if not wrong:
        return
    again = _beyond(trial.second, asked)
    for name, message in wrong.items():
        if name in again:
            yield WrongWhenAsked("asked", name, f"{how}, {message}")


def _beyond(trial: Trial, asked: Asked) -> dict[str, str]:
    """Results beyond their budget, in words, by name; not those that are beyond it when everything is asked for."""
    observed = trial.observe_with(trial.inputs, trial.poisons[0], asked=asked)
    found: dict[str, str] = {}
    if observed.spent:
        return found
    for name in ("out", "lse", *(f"d{name}" for name in asked.gradients)):
        usual, got = trial.observations[0].results.get(name), observed.results.get(name)
        if (message := _off(trial, name, got)) is not None and _off(trial, name, usual) is None:
            found[name] = message
    return found


def _off(trial: Trial, name: str, got: torch.Tensor | None) -> str | None:
    """How a result is off, in words, or None."""
    expected = trial.answer[name]
    if got is None or got.shape != expected.value.shape:
        return None if name == "lse" else "it is missing, or has another shape"
    z = deviations(trial.case, got, expected)
    if not z.numel() or not z.max() > limit(trial.case):
        return None
    worst = int(z.argmax())
    values = (x.flatten()[worst].item() for x in (got, expected.value))
    return "got {:.6g}, expected {:.6g}, z = {:.3g}".format(*values, z.max().item())
