"""The same call, launched in another way (captured, across streams, compiled): what it gives is what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch

from attn_fuzz.execution.inferred import promises
from attn_fuzz.execution.observation import Observation
from attn_fuzz.oracle.checks.budget import place_of
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.symptoms import Element
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import FAR_MEMORIES
from attn_fuzz.reference.memory import bits, same_bits

ONE_AT_A_TIME: Final = ("broadcast", *FAR_MEMORIES)
"""Memory layouts of calls that are not launched otherwise, which takes their inputs up to four times: rows that are one
row cannot be written one by one, and those far apart take up to 16 GiB."""


def spoiled(drawn: Inputs) -> Inputs:
    """What lies there before the inputs come, and after the call: numbers, but other ones."""
    return Inputs(**{name: torch.ones_like(x) for name, x in drawn.named.items()})


_TIMES: Final = 3
"""Further runs that have to agree where nobody has promised the same bits."""


class Unlike(NamedTuple):
    """A result that is another one."""

    tensor: str
    words: str
    z: float | None = None
    element: Element | None = None


def unlike(
    trial: Trial, usual: Observation, got: Observation, again: Callable[[], Observation], *, exact: bool = True
) -> Iterator[Unlike]:
    """Results that have other bits than those of the usual call, or are beyond a budget that those keep.

    Args:
        trial: the case.
        usual: what the call gives as it is usually made.
        got: what it gave when it was launched in another way.
        again: launches it in that way once more.
        exact: whether the arithmetic is the same, and so bits where the backend repeats itself.
    """
    for name, before in usual.results.items():
        after = got.results.get(name)
        if after is None or after.shape != before.shape or after.dtype != before.dtype:
            yield Unlike(name, "it is missing, or has another shape or dtype")
        elif same_bits(before, after):
            continue
        elif exact and trial.repeats(name) and _steady(trial, name, after, again):
            first = int((bits(before) != bits(after)).flatten().nonzero()[0])
            yield _told(trial, name, before, after, first)
        else:
            expected = trial.answer[name]
            z = deviations(trial.case, after, expected)
            if z.max() > limit(trial.case) and not (deviations(trial.case, before, expected) > limit(trial.case)).any():
                yield _told(trial, name, before, after, int(z.argmax()), z.max().item())


def _steady(trial: Trial, name: str, after: torch.Tensor, again: Callable[[], Observation]) -> bool:
    """Whether bits are others by what is done otherwise, and not by chance."""
    if promises(trial.backend, str(trial.device), name):
        return True
    if trial.moves_by_itself(name):
        return False
    others = (again().results.get(name) for _ in range(_TIMES))
    return all(other is not None and same_bits(after, other) for other in others)


def _told(
    trial: Trial, name: str, before: torch.Tensor, after: torch.Tensor, place: int, z: float | None = None
) -> Unlike:
    came, should = (x.flatten()[place].item() for x in (after, before))
    element = Element(place_of(trial, name, place, after.shape), came, should)
    count = int((bits(before) != bits(after)).sum())
    told = f"{element.place} is {came:.9g} instead of {should:.9g}{'' if z is None else f', z = {z:.3g}'}"
    return Unlike(name, f"{told}; {count} elements have other bits", z, element)
