"""Halves: the output's gradient of some micro-sequences, and that of the others; their float32 sums add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import torch

from attn_fuzz.generation.strategies import straddling
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import micro_sequences
from attn_fuzz.reference.profile import UNIT_ROUNDOFF

_ROUNDINGS: Final = 64
"""Float32 roundings of the largest element that the sums may differ by: four hundred tokens, added in any order."""

_ALWAYS: Final = ("dk", "dv", "d_query", "d_query_norm", "d_dense")
_WITHOUT_STRADDLING: Final = ("d_key_value", "d_key_norm", "d_value_norm")
"""Of keys and values, later micro-sequences add to a row before it is stored: only whole documents come apart there."""


def summed_in_float32(case: Case, results: Mapping[str, torch.Tensor]) -> list[str]:
    """Results whose sums over micro-sequences come apart, and are kept in float32 where the case is not."""
    if case.dtype == "fp32" or not case.cuts:
        return []
    names = _ALWAYS if straddling(case) else (*_ALWAYS, *_WITHOUT_STRADDLING)
    return [name for name in names if name in results and results[name].dtype == torch.float32]


def with_gradient_of(case: Case, inputs: LayerInputs, half: int) -> LayerInputs:
    """The inputs with the output's gradient of every other micro-sequence, from the given one on, and 0 elsewhere."""
    dout = inputs.dout.clone()
    for number, part in enumerate(micro_sequences(case)):
        if number % 2 != half:
            dout[slice(*part)] = 0
    return dataclasses.replace(inputs, dout=dout)


def apart(whole: torch.Tensor, first: torch.Tensor, second: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Elements that do not add up, bool.

    Args:
        whole: a sum over all micro-sequences.
        first: that of a half of them.
        second: that of the others.
        largest: the largest element of any of them, which broadcasts to their shape.
    """
    return (whole.double() - first.double() - second.double()).abs() > _ROUNDINGS * UNIT_ROUNDOFF["fp32"] * largest
