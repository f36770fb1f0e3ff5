"""Additivity: a backward is linear in the output's gradient, so float32 sums over micro-sequences add up.

Whole numbers (accumulation.py) reach the gradients of values and of the output projection only. Every other sum is
taken apart here: with the output's gradient of half of the micro-sequences, and with that of the other half, each
micro-sequence adds the same bits as before or nothing, so that the two results add up to the whole one but for the
roundings of float32. A sum that is rounded to the storage dtype on its way does not: two of its values have a sum that
the dtype cannot hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import torch

from attn_fuzz.execution.inferred import promises
from attn_fuzz.generation.strategies import straddling
from attn_fuzz.oracle.checks.budget import place_of
from attn_fuzz.oracle.symptoms import Element, NotExact, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import micro_sequences
from attn_fuzz.reference.profile import UNIT_ROUNDOFF

ROUNDINGS: Final = 64
"""Float32 roundings of the largest element that the sums may differ by: four hundred tokens, added in any order."""

_ALWAYS: Final = ("dk", "dv", "d_query", "d_query_norm", "d_dense")
_WITHOUT_STRADDLING: Final = ("d_key_value", "d_key_norm", "d_value_norm")
"""Of keys and values, later micro-sequences add to a row before it is stored: only whole documents come apart there."""


def sums_add_up(trial: Trial) -> Iterator[Symptom]:
    """Float32 gradients of two halves of the micro-sequences add up to those of the whole."""
    case, inputs = trial.case, trial.inputs
    if case.dtype == "fp32" or not case.cuts or not isinstance(inputs, LayerInputs):
        return
    whole = trial.observations[0].results
    names = [
        name
        for name in (_ALWAYS if straddling(case) else (*_ALWAYS, *_WITHOUT_STRADDLING))
        if name in whole and whole[name].dtype == torch.float32 and trial.repeats(name)
    ]
    if not names:
        return
    halves = [trial.observe_with(_with_gradient_of(trial, inputs, half), trial.poisons[0]).results for half in (0, 1)]
    for name in names:
        parts = [half[name].double() for half in halves if name in half]
        got = whole[name].double()
        if len(parts) < len(halves) or any(part.shape != got.shape for part in parts):
            continue
        largest = max(float(x.abs().max()) for x in (got, *parts)) if got.numel() else 0.0
        off = (got - parts[0] - parts[1]).abs() > ROUNDINGS * UNIT_ROUNDOFF["fp32"] * largest
        if off.any() and (promises(trial.backend, str(trial.device), name) or not trial.moves_by_itself(name)):
            first = int(off.flatten().nonzero()[0])
            place = place_of(trial, name, first, whole[name].shape)
            together, *apart = (x.flatten()[first].item() for x in (got, *parts))
            values = "{:.9g}, but {:.9g} and {:.9g}".format(together, *apart)
            yield NotExact(
                "additivity",
                name,
                f"{place}: {values} of two halves of the micro-sequences; {int(off.sum())} elements do not add up",
                element=Element(place, together, sum(apart)),
            )


def _with_gradient_of(trial: Trial, inputs: LayerInputs, half: int) -> LayerInputs:
    """The inputs with the output's gradient of every other micro-sequence, from the given one on, and 0 elsewhere."""
    dout = inputs.dout.clone()
    for number, part in enumerate(micro_sequences(trial.case)):
        if number % 2 != half:
            dout[slice(*part)] = 0
    return dataclasses.replace(inputs, dout=dout)
