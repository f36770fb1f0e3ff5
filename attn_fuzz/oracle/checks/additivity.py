"""Additivity: a backward is linear in the output's gradient, so float32 sums over micro-sequences add up.

Whole numbers (accumulation.py) reach the gradients of values and of the output projection only. Every other sum is
taken apart here: with the output's gradient of half of the micro-sequences, and with that of the other half, each
micro-sequence adds the same bits as before or nothing, so that the two results add up to the whole one but for the
roundings of float32. A sum that is rounded to the storage dtype on its way does not: two of its values have a sum that
the dtype cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_fuzz.execution.inferred import promises
from attn_fuzz.oracle.checks.budget import place_of
from attn_fuzz.oracle.relations.halves import apart, summed_in_float32, with_gradient_of
from attn_fuzz.oracle.symptoms import Element, NotExact, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.layer import LayerInputs


def sums_add_up(trial: Trial) -> Iterator[Symptom]:
    """Float32 gradients of two halves of the micro-sequences add up to those of the whole."""
    case, inputs = trial.case, trial.inputs
    if not isinstance(inputs, LayerInputs):
        return
    whole = trial.observations[0].results
    names = [name for name in summed_in_float32(case, whole) if trial.repeats(name)]
    if not names:
        return
    halves = [trial.observe_with(with_gradient_of(case, inputs, half), trial.poisons[0]).results for half in (0, 1)]
    for name in names:
        parts = [half[name].double() for half in halves if name in half]
        got = whole[name].double()
        if len(parts) < len(halves) or any(part.shape != got.shape for part in parts):
            continue
        largest = torch.stack([x.abs().max() for x in (got, *parts)]).max() if got.numel() else got.new_zeros(())
        off = apart(got, parts[0], parts[1], largest)
        if off.any() and (promises(trial.backend, str(trial.device), name) or not trial.moves_by_itself(name)):
            first = int(off.flatten().nonzero()[0])
            place = place_of(trial, name, first, whole[name].shape)
            together, *both = (x.flatten()[first].item() for x in (got, *parts))
            values = "{:.9g}, but {:.9g} and {:.9g}".format(together, *both)
            yield NotExact(
                "additivity",
                name,
                f"{place}: {values} of two halves of the micro-sequences; {int(off.sum())} elements do not add up",
                element=Element(place, together, sum(both)),
            )
