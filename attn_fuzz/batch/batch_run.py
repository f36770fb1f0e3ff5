"""A batch while it is judged: its runs so far, what they are held to, and who is accused of what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.verdicts import COLUMNS
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import PLAIN, BatchResult, How, run_batch
from attn_fuzz.execution.inferred import inferred
from attn_fuzz.execution.observation import in_our_convention
from attn_fuzz.oracle.symptoms import Symptom
from attn_fuzz.reference.answer import KERNEL_TENSORS, Inputs, kernel_inputs

PROBED: Final = tuple(f"{name} of the probe" for name in KERNEL_TENSORS)
APART: Final = "isolation"
TAILS: Final = "tails"
COMPANY: Final = "company"
STREAMS: Final = "streams"
GRAPHS: Final = "graphs"
COMPILED: Final = "compiled"
NAMES: Final = (*COLUMNS, APART, TAILS, COMPANY, STREAMS, GRAPHS, COMPILED, *PROBED)
"""What is judged of each document: its budgets; then isolation, rows behind the last document, other bits in
other company, between streams, of a captured graph or inside what torch compiles, and a probe."""

Results = dict[str, torch.Tensor]

_OTHER: Final = {"nan": "finite", "finite": "nan"}


class BatchRun:
    """A batch while it is judged.

    Args:
        batch: the calls.
        backend: what runs them.
        device: where.
        poison: contents of unwritten memory when the drawn values run.
        asked: how many of the calls, from the first on, are asked more than the budgets.
        beat: called before every call of every run.
    """

    def __init__(
        self,
        batch: CallBatch,
        backend: Backend,
        device: torch.device,
        poison: str,
        asked: int,
        beat: Callable[[], None],
    ) -> None:
        self.backend, self.device = backend, device
        self.poison, self.other_poison, self.beat = poison, _OTHER[poison], beat
        self.batch = batch if asked == len(batch.ends) else batch.first(asked)
        """The calls that are asked."""
        self.case, self.whole = self.batch.case, batch.case
        self.profile = backend.kernel.profile_on(device.type)
        self.drawn = kernel_inputs(batch.case, device)
        self.runs: list[BatchResult] = []
        self.placed: list[BatchTensors] = []
        self.tensors_of_calls = self.load(batch, self.drawn)
        self.accused: dict[str, torch.Tensor] = {}
        """By names of ``NAMES``: of the first documents, float64 in units in which the verdict is at LIMIT."""
        self.counted: dict[str, torch.Tensor] = {}
        """How often something was asked of which there is a count, and how it went: whole numbers on any device."""
        self.spares: tuple[int, ...] = ()
        self.symptoms: Mapping[str, type[Symptom]] = {}
        self.all_first = self.run_batch(self.tensors_of_calls, poison, every=True).results
        self.held = [self.all_first]
        """Results of the whole batch that its budgets hold for."""
        self.deviations: list[torch.Tensor] = []
        """``largest_z`` of the first documents by other budgets."""
        rows, keys = sum(self.case.packed_lengths), sum(self.case.packed_key_lengths)
        self.rows = {"q": rows, "k": keys, "v": keys, "dout": rows, "dlse": rows, "dk": keys, "dv": keys}
        self.first = {name: x[: self.rows.get(name, rows)] for name, x in self.all_first.items()}
        """What the calls that are asked gave for the drawn values."""

    @functools.cached_property
    def promised(self) -> tuple[str, ...]:
        """Results that have the same bits every time: as the backend promises or, without a promise, as calls tell."""
        repeats = inferred(self.backend, str(self.device)).repeats
        return tuple(name for name in KERNEL_TENSORS if repeats(name))

    def inputs(self) -> Inputs:
        """The drawn values of the calls that are asked."""
        return Inputs(**{name: x[: self.rows[name]] for name, x in self.drawn.named.items()})

    def load(self, batch: CallBatch, inputs: Inputs, spares: Sequence[int] = ()) -> BatchTensors:
        """Tensors in their places, which are looked at again in the end."""
        self.placed.append(BatchTensors.of(self.backend, batch, inputs, self.device, spares))
        return self.placed[-1]

    def run_batch(self, what: BatchTensors, poison: str, how: How = PLAIN, *, every: bool = False) -> BatchResult:
        """A run of the calls that are asked, or of every one."""
        calls = None if every else len(self.batch.ends)
        batch_result = run_batch(what, self.backend, poison, how, calls=calls, beat=self.beat)
        self.runs.append(batch_result)
        if "lse" in batch_result.results:
            batch_result.results["lse"] = in_our_convention(batch_result.results["lse"], self.backend, self.device)
        return batch_result

    def run(self, what: BatchTensors, poison: str, how: How = PLAIN) -> Results:
        """The results of a run of the calls that are asked."""
        return self.run_batch(what, poison, how).results

    def hold(self, results: Results) -> None:
        """Holds results of the calls that are asked to the batch's budgets."""
        rest = {name: self.all_first[name][len(x) :] for name, x in results.items() if name in self.all_first}
        self.held.append({name: torch.cat([results[name], others]) for name, others in rest.items()})

    def accuse(self, name: str, documents: torch.Tensor) -> None:
        """Something exact is wrong with some documents, bool ``[documents]``."""
        self.accused[name] = torch.where(documents, torch.inf, 0.0).double()
