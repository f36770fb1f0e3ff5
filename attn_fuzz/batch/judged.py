"""What a backend made of a batch, and what that says of its calls and documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch

from attn_fuzz.batch.batch_run import APART, COMPANY, COMPILED, GRAPHS, NAMES, PROBED, STREAMS, TAILS
from attn_fuzz.batch.layer_columns import HALVES, LAYER_TENSORS, OF_RANK, REPLICAS, STEPS, WHOLE
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.symptoms import (
    Crashed,
    DeadRowsNotZero,
    MissingResult,
    NotBatchInvariant,
    NotCompiled,
    NotExact,
    NotIsolated,
    NotOrdered,
    NotReplayed,
    PoisonLeaked,
    RanksDiffer,
    Symptom,
    WrongSpread,
    WroteOutside,
    wrong_tensor,
)
from attn_fuzz.reference.answer import KERNEL_TENSORS
from attn_fuzz.reference.case import Case

BY_BITS: Final = ("bits", APART, COMPANY, STREAMS, GRAPHS, COMPILED)
"""Columns that are about bits which must not move."""

_EXACT: Final[dict[str, type[Symptom]]] = {
    "bits": PoisonLeaked,
    APART: NotIsolated,
    TAILS: DeadRowsNotZero,
    COMPANY: NotBatchInvariant,
    STREAMS: NotOrdered,
    GRAPHS: NotReplayed,
    COMPILED: NotCompiled,
    STEPS: WroteOutside,
    WHOLE: NotExact,
    HALVES: NotExact,
    REPLICAS: RanksDiffer,
    OF_RANK: DeadRowsNotZero,
}
"""Columns that are 0 or inf, and what a document is accused of in them."""


def tensor_of(name: str) -> str:
    """The result that a column is about; empty for those that are about any."""
    tensor = name.split()[0].removesuffix("-rows") if name else ""
    return tensor if tensor in KERNEL_TENSORS or tensor in LAYER_TENSORS else ""


class Question(NamedTuple):
    """What is asked of a batch, beside the budgets."""

    poison: str
    """Contents of unwritten memory when the drawn values run."""
    asked: str = ""
    """One of ``QUESTIONS``, or of a layer of ``LAYER_QUESTIONS``."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a backend made of a batch."""

    batch: CallBatch
    z: torch.Tensor
    """float64 ``[documents, len(names)]`` on the CPU, in units in which the verdict is at LIMIT; inf where something
    exact is wrong."""
    question: Question
    """What was asked."""
    broken: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Calls that raised or gave something else than was asked for, in words."""
    refused: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Calls that the backend refused."""
    touched: bool = False
    """Some input, gap or prefix sum has other bits than before; which call's work that was is not known."""
    paths: frozenset[str] = frozenset()
    """Implementations that ran."""
    spares: tuple[int, ...] = ()
    """Rows behind the last document that the first calls were handed in some run."""
    asked: int = 1
    """Of how many calls, from the first on, more was asked than the budgets."""
    symptoms: Mapping[str, type[Symptom]] = dataclasses.field(default_factory=dict)
    """What the probe calls a result that fails it."""
    names: tuple[str, ...] = NAMES
    """The columns of ``z``."""
    counted: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How often something was asked of which there is a count, and how it went."""
    missing: frozenset[str] = frozenset()
    """Results that the backend does not give, such as an LSE: nothing is known of their deviations."""
    incomplete: frozenset[int] = frozenset()
    """Calls of ``broken`` that raised nothing, but gave no such result, or one of another shape or dtype."""

    def call(self, index: int) -> Case:
        """One of the calls as a case of its own, such as the case mode may show to fail."""
        small = self.batch.call(index)
        return small.replace(capacity=self.spares[index]) if index < len(self.spares) else small

    def call_of(self, document: int) -> int:
        """The call that a document is in."""
        return next(index for index, end in enumerate(self.batch.ends) if document < end)

    def fallen(self, index: int) -> type[Symptom]:
        """What a call is accused of that is broken."""
        return MissingResult if index in self.incomplete else Crashed

    def symptom(self, name: str) -> type[Symptom]:
        """What a call is accused of whose largest deviation is in that column."""
        if name in PROBED:
            return self.symptoms[name.split()[0]]
        return _EXACT.get(name) or (WrongSpread if name.endswith("-rows") else wrong_tensor(name))

    def worst(self) -> list[tuple[float, str]]:
        """Of every call: the largest deviation in units in which the verdict is at LIMIT, and whose it is."""
        found = []
        for index, (begin, end) in enumerate(self.batch.spans):
            if index in self.broken:
                found.append((torch.inf, self.broken[index]))
                continue
            own = self.z[begin:end]
            if index in self.refused or not own.numel():
                found.append((0.0, ""))
                continue
            largest, column = own.amax(0).max(0)
            found.append((largest.item(), self.names[int(column)]))
        return found

    def largest(self) -> dict[str, tuple[float, int]]:
        """Of each result: its largest deviation in the same units, and the document in which it was seen."""
        z = self.z.clone()
        for index in {*self.refused, *self.broken}:
            z[slice(*self.batch.spans[index])] = 0.0
        worst, documents = z.max(0)
        return {
            name: (z, document)
            for name, z, document in zip(self.names, worst.tolist(), documents.tolist(), strict=True)
            if name not in _EXACT and name not in PROBED and tensor_of(name) not in self.missing
        }

    def failing(self) -> list[int]:
        """Calls that are beyond the limit, worst first."""
        worst = self.worst()
        beyond = [index for index, (z, _) in enumerate(worst) if z > LIMIT]
        return sorted(beyond, key=lambda index: -worst[index][0])

    def wrong(self) -> torch.Tensor:
        """bool ``[documents, columns]``: beyond the limit; all of a call that fails as a whole, and none of one that
        was refused."""
        wrong = self.z > LIMIT
        if self.touched:
            wrong.fill_(True)
        for calls, verdict in ((self.refused, False), (self.broken, True)):
            for index in calls:
                wrong[slice(*self.batch.spans[index])] = verdict
        return wrong
