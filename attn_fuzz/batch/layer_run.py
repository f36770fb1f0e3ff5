"""A batch of layer calls while it is judged: its runs so far, what they are held to, and who is accused of what.

Documents are independent in a layer too, and all that is not attention is per token: one packed layer case, drawn and
answered at once, is many calls. Only the layer under test runs call by call, as itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.layer_columns import LAYER_NAMES, OF_RANK, REPLICAS, STEPS
from attn_fuzz.batch.layer_ranks import CallsOnRanks, run_on_ranks
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.inferred import inferred
from attn_fuzz.execution.layer_calls import OF_TOKENS, LayerHow, LayerResults, run_layer_calls
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.oracle.deviations import LIMIT, deviations, limit
from attn_fuzz.oracle.trial import as_shown
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.layer import LayerInputs, layer_answer, layer_inputs
from attn_fuzz.reference.memory import bits
from attn_fuzz.reference.packed import packed
from attn_fuzz.reference.transfer import transferred

SAMPLES: Final = 12
"""Simulated roundings behind a batch's budgets. Student's t with 12 degrees of freedom exceeds 10 once in 3e6 elements,
but half of each variance is its row's mean: the largest deviation of 183,000 calls was 9.6 (of 208,000 with 16 samples
8.6). What exceeds is looked at again by the case mode, with more samples."""

Results = Mapping[str, torch.Tensor]

Tensors = LayerTensors | CallsOnRanks
"""Of calls on one rank, or on several."""

_OTHER: Final = {"nan": "finite", "finite": "nan"}


class LayerBatchRun:
    """A batch of layer calls while it is judged.

    Args:
        batch: the calls.
        backend: whose layer.
        device: where.
        poison: contents of unwritten memory when the drawn values run.
        asked: how many of the calls, from the first on, are asked more than the budgets.
        beat: called before every call of every run.
        samples: simulated roundings behind the budgets.
    """

    def __init__(
        self,
        batch: CallBatch,
        backend: Backend,
        device: torch.device,
        poison: str,
        asked: int,
        beat: Callable[[], None] = lambda: None,
        samples: int = SAMPLES,
    ) -> None:
        self.backend, self.device = backend, device
        self.poison, self.other_poison, self.beat = poison, _OTHER[poison], beat
        self.batch = batch if asked == len(batch.ends) else batch.first(asked)
        """The calls that are asked."""
        self.all, self.case, self.samples = batch, self.batch.case, samples
        everything = layer_inputs(batch.case, device)
        tokens = self.case.tokens
        self.drawn = dataclasses.replace(everything, x=everything.x[:tokens], dout=everything.dout[:tokens])
        """Of the calls that are asked."""
        self._everything = everything
        self.runs: list[LayerResults] = []
        self.placed: list[Tensors] = []
        self.tensors = self.load(batch, everything)
        self.z = torch.zeros(len(batch.case.packed_lengths), len(LAYER_NAMES), dtype=torch.float64, device=device)
        self.all_first: dict[str, torch.Tensor] = {}
        self.first: dict[str, torch.Tensor] = {}
        """What the calls that are asked gave for the drawn values."""

    def begin(self, how: LayerHow) -> None:
        """Runs every call with the drawn values; what ``how`` says of interfering calls is for those that are asked."""
        self.all_first = self.run(self.tensors, self.poison, how, every=True)
        self.first = {name: x[: self.count(name)] for name, x in self.all_first.items()}

    def count(self, name: str) -> int:
        """Rows of a result of the calls that are asked."""
        return self.case.tokens if name in OF_TOKENS else len(self.batch.ends)

    @functools.cached_property
    def owner(self) -> torch.Tensor:
        """int64 ``[tokens]``: the document of each."""
        return packed(self.all.case.packed_lengths, self.device).owner

    @functools.cached_property
    def beginnings(self) -> torch.Tensor:
        """int64 ``[calls]``: the first document of each."""
        return transferred([begin for begin, _ in self.all.spans], self.device)

    @functools.cached_property
    def call_of_token(self) -> torch.Tensor:
        """int64 ``[tokens]``: the call of each, of those that are asked."""
        counts = transferred([span.length for span in self.batch.tokens], self.device)
        return torch.repeat_interleave(counts, output_size=self.case.tokens)

    @functools.cached_property
    def _expected(self) -> dict[str, Expected]:
        """What the drawn values should give in all calls."""
        profile = as_shown(self.backend.kernel.profile_on(self.device.type), self.all_first)
        conventions = self.backend.kernel.capabilities_on(self.device.type).conventions
        return layer_answer(self.all.case, self._everything, profile, self.samples, self.all.tokens, conventions)

    def expected(self, name: str, rows: int) -> Expected | None:
        """What the drawn values should give in so many rows of a result, from the first on; None for what is no one."""
        expected = self._expected.get(name)
        return None if expected is None else Expected(expected.value[:rows], expected.variance[:rows])

    def repeats(self, name: str) -> bool:
        """Whether a result has the same bits every time, as the backend promises or a few runs have told."""
        return inferred(self.backend, str(self.device)).repeats(name)

    def load(self, batch: CallBatch, inputs: LayerInputs) -> Tensors:
        """Tensors in their places, which are looked at again in the end."""
        kind = CallsOnRanks if batch.case.all_ranks > 1 else LayerTensors
        self.placed.append(kind(batch, inputs, self.device, self.poison))
        return self.placed[-1]

    def run(
        self, tensors: Tensors, poison: str, how: LayerHow | None = None, *, every: bool = False
    ) -> dict[str, torch.Tensor]:
        """The results of a run of the calls that are asked, or of every one; who strayed in it is accused."""
        calls = tensors.batch.calls if every else tensors.batch.calls[: len(self.batch.ends)]
        how = how or LayerHow(watched=False)
        if isinstance(tensors, CallsOnRanks):
            found = run_on_ranks(tensors, self.backend, calls, poison, how, self.beat)
        else:
            found = run_layer_calls(tensors, self.backend, calls, poison, how, self.beat)
        self.runs.append(found)
        for column, wrong in ((STEPS, found.strayed), (REPLICAS, found.unlike), (OF_RANK, found.alive)):
            for index in wrong:
                self.z[self.all.spans[index][0], LAYER_NAMES.index(column)] = torch.inf
        return found.results

    def hold(self, results: Results) -> None:
        """Holds results to the budgets of the drawn values: of every call, or of those that are asked."""
        case = self.all.case
        unit = LIMIT / limit(case)
        for name, got in results.items():
            if (expected := self.expected(name, len(got))) is not None:
                self.note(name, name, deviations(case, got, expected) * unit)

    def note(self, column: str, name: str, beyond: torch.Tensor) -> None:
        """Notes what is wrong with a result's elements, float64 in units in which the verdict is at LIMIT, or bool."""
        if beyond.dtype == torch.bool:
            beyond = torch.where(beyond, torch.inf, 0.0).double()
        if not beyond.numel():
            return
        places = self.owner if name in OF_TOKENS else self.beginnings
        worst = beyond.flatten(1).amax(1)
        # Of the first rows, where not every call was run.
        places = places[: len(worst)]
        self.z[:, LAYER_NAMES.index(column)].scatter_reduce_(0, places, worst, "amax")

    def note_moved(self, names: Iterable[str], results: Results) -> None:
        """Notes documents that have other bits in some of these results than in the first run."""
        for name in names:
            before, now = self.first.get(name), results.get(name)
            if before is not None and now is not None and before.dtype == now.dtype:
                self.note("bits", name, (bits(before) != bits(now)).view(before.shape))

    def by_call(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The largest magnitude of a result in each call, float64, in a shape that broadcasts to the result's."""
        rows = x.double().abs().flatten(1).amax(1)
        shape = (-1, *(1,) * (x.dim() - 1))
        if name not in OF_TOKENS:
            return rows.view(shape)
        largest = rows.new_zeros(len(self.batch.ends)).scatter_reduce(0, self.call_of_token, rows, "amax")
        return largest[self.call_of_token].view(shape)
