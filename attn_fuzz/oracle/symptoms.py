"""One exception type per symptom, so that Hypothesis reports and shrinks each by itself.

A shrink that may pass from one failure to another ends at whichever is easiest to reach; distinct types forbid that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a wrong element is, in words of the case."""

    document: int | None
    row: int
    """Row within the document; within the tensor where there is no document."""
    head: int | None = None
    channel: int | None = None

    def __str__(self) -> str:
        named = {"document": self.document, "row": self.row, "head": self.head, "channel": self.channel}
        return ", ".join(f"{name} {number}" for name, number in named.items() if number is not None)


@dataclasses.dataclass(frozen=True)
class Element:
    """A wrong element of a result."""

    place: Place
    got: float
    """What came out there."""
    expected: float
    """What should have."""

    @property
    def nan(self) -> bool:
        """NaN came out."""
        return math.isnan(self.got)


def number(x: float) -> float | str:
    """A number as JSON has it, which knows no NaN and no infinities: those as ``nan``, ``inf`` and ``-inf``."""
    return x if math.isfinite(x) else str(x)


class Symptom(AssertionError):
    """Something that a correct backend does not do.

    Args:
        check: name of the check that saw it.
        tensor: what is wrong.
        message: one sentence.
        z: error in standard deviations of the budget, where that is what was measured.
        nan: what came back is NaN.
        element: the first or the worst of the elements that are wrong, where it is one of them that was looked at.
        failing: how far the wrong elements reach, ``one``, ``some`` or ``all``, by ``documents``, ``rows`` of these,
            ``heads`` and ``channels``, where that was looked at.
    """

    rank: ClassVar[int] = 0
    """Of several symptoms the one with the lowest rank names the finding."""

    def __init__(
        self,
        check: str,
        tensor: str,
        message: str,
        z: float | None = None,
        *,
        nan: bool = False,
        element: Element | None = None,
        failing: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{type(self).__name__} [{check}] {tensor}: {message}")
        self.check, self.tensor, self.message, self.z, self.element = check, tensor, message, z, element
        self.failing = dict(failing or {})
        self.nan = nan or (element is not None and element.nan)
        self.probe: Callable[..., Any] | None = None
        """The check with runs of its own that saw it, if it was one."""

    def to_dict(self) -> dict[str, Any]:
        """What it says but for the sentence, ready for JSON: what was not measured, or is no element, is left out."""
        found: dict[str, Any] = {"symptom": type(self).__name__, "check": self.check, "tensor": self.tensor}
        if self.z is not None:
            found["z"] = number(self.z)
        if self.element is not None:
            place = dataclasses.asdict(self.element.place)
            found |= {name: value for name, value in place.items() if value is not None}
            found |= {"got": number(self.element.got), "expected": number(self.element.expected)}
        return found | ({"failing": self.failing} if self.failing else {})


class Crashed(Symptom):
    """The backend raised, or its process died."""

    rank = 0
    error: str = ""
    """What kind of exception it was, where it was one (``execution.process.kind_of``)."""


class Hung(Symptom):
    """The backend did not come back in time."""

    rank = 0


class PoisonLeaked(Symptom):
    """A result depends on memory that nobody wrote: other contents, other bits.

    NaN that comes whatever unwritten memory holds is arithmetic, and named after the tensor that it is in.
    """

    rank = 1


class DeadRowsNotZero(Symptom):
    """Rows that no query attended to have a gradient."""

    rank = 2


class NotIsolated(Symptom):
    """A result depends on a document, or on keys, that it must not see."""

    rank = 14


class NotRepeatable(Symptom):
    """The same call again gives other bits, though the backend promises the same."""

    rank = 15


class WrongWhenAsked(Symptom):
    """A result is wrong when less is asked of autograd, or the same twice."""

    rank = 15


class NotReplayed(Symptom):
    """A CUDA graph gives something else than the call that it was captured of, or cannot be captured as promised."""

    rank = 15


class NotOrdered(Symptom):
    """A call does not wait for what comes before it on its stream, or what comes after does not wait for the call."""

    rank = 15


class NotCompiled(Symptom):
    """Compiled by torch, around it or in a module, a call gives something else than by itself."""

    rank = 15


class KeepsState(Symptom):
    """A second sequence through the same object is wrong, and right through a new one."""

    rank = 15


class NotRegrouped(Symptom):
    """The same documents in another order, or cut elsewhere, give other results."""

    rank = 16


class NotMerged(Symptom):
    """Results over two parts of the keys, merged by their LSEs, are not those over all keys."""

    rank = 16


class NotBatchInvariant(Symptom):
    """A document's results depend on the company that it has in its call, or are wrong in another one."""

    rank = 16


class MovedByPlacement(Symptom):
    """Looser bounds, rows between documents, or rows far apart give other bits, which is promised not to be."""

    rank = 16


class NotExact(Symptom):
    """A sum that float32 holds, of whole numbers or of large and small ones, has lost some of them."""

    rank = 17


class WrongSpread(Symptom):
    """No element is outside its budget, but too many are near its edge."""

    rank = 18


class WrongPath(Symptom):
    """Another implementation ran than the one that was meant to."""

    rank = 19


class RanksDiffer(Symptom):
    """What all ranks should have alike is not the same on each."""

    rank = 4


class WroteOutside(Symptom):
    """Buffer rows changed that this step does not own."""

    rank = 3


class InputsChanged(Symptom):
    """An input, its metadata or the guard margin around it no longer has its bits."""

    rank = 4


class WrongKeys(Symptom):
    """Other keys than the allowed ones took part in the forward, or none did as it should."""

    rank = 12


class WrongKeysBackward(Symptom):
    """Other keys than the allowed ones took part in the backward, or none did as it should."""

    rank = 13


class WrongOutput(Symptom):
    """The forward output is outside its budget."""

    rank = 5


class WrongLse(Symptom):
    """The log-sum-exp is outside its budget."""

    rank = 6


class WrongBuffer(Symptom):
    """The K/V buffer does not hold the keys and values it should."""

    rank = 5


class WrongGradQ(Symptom):
    """dQ is outside its budget."""

    rank = 7


class WrongGradK(Symptom):
    """dK is outside its budget."""

    rank = 8


class WrongGradV(Symptom):
    """dV is outside its budget."""

    rank = 9


class WrongInputGradient(Symptom):
    """The layer's input gradient is outside its budget."""

    rank = 10


class WrongParameterGradient(Symptom):
    """A parameter's gradient is outside its budget."""

    rank = 11


class MissingResult(Symptom):
    """A result is absent, or has the wrong shape or dtype."""

    rank = 0


MEMORY_SYMPTOMS = (PoisonLeaked, DeadRowsNotZero)
"""Two faces of unwritten memory: which one shows depends on what was there."""

WRONG_TENSOR: dict[str, type[Symptom]] = {
    "out": WrongOutput,
    "lse": WrongLse,
    "k": WrongBuffer,
    "v": WrongBuffer,
    "dq": WrongGradQ,
    "dk": WrongGradK,
    "dv": WrongGradV,
    "dx": WrongInputGradient,
}


def wrong_tensor(tensor: str) -> type[Symptom]:
    """The symptom of a tensor outside its budget."""
    return WRONG_TENSOR.get(tensor, WrongParameterGradient)
