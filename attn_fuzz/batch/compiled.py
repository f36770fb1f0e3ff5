"""A batch's calls inside what torch compiles: one compiled callable, called with all of their layouts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.batch.batch_run import COMPILED, BatchRun, Results
from attn_fuzz.batch.verdicts import largest_z, other_bits
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import BatchResult, Call
from attn_fuzz.execution.compiled_call import Compiled, NotCompiledYet, NotTraceable
from attn_fuzz.execution.observation import in_our_convention
from attn_fuzz.execution.process import in_words, raise_lack_of_memory
from attn_fuzz.oracle.checks import compiled as single
from attn_fuzz.oracle.deviations import limit
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.layout import borders

GRAPHS: Final = {False: 6, True: 4}
"""Compiled for a batch, about, without and with code of the compiler's own: each takes up to a second, or several. Two
to four serve any layouts, of a kernel that is traced as a whole. Then calls are left out that would take more."""


def compiled_alike(batch_run: BatchRun) -> None:
    """All calls by what is compiled for the first few layouts, around the call or in a module: bits, or budgets."""
    backend, device, calls = batch_run.backend, batch_run.device, len(batch_run.batch.ends)
    if not single.compilable(backend, device):
        return
    failed, way = single.refusals(backend, device), single.Way.of(batch_run.case, device)
    inside, refused = _Inside(batch_run, _Places(batch_run)), 0
    if not single.given_up(backend, device):
        try:
            inside.run(way.compiled(backend), range(calls), GRAPHS[way.generated])
            refused = calls
        except NotTraceable as refusal:
            failed.append(str(refusal))
            refused = inside.begun
    batch_run.runs.append(inside.failed)
    _count(batch_run, {single.COMPILED: len(inside.ran), f"{single.REFUSED} ({single.AS_IT_IS})": inside.as_they_are})
    found = inside.wrong(way) if inside.ran else inside.found
    if refused < calls:
        _count(batch_run, {f"{single.REFUSED} ({failed[-1]})": calls - refused})
        if backend.kernel.capabilities_on(device.type).traceable:
            found[slice(*batch_run.batch.spans[refused])] = True
    batch_run.accuse(COMPILED, found)


def _count(batch_run: BatchRun, numbers: dict[str, int]) -> None:
    """Of what there is none nothing is said."""
    batch_run.counted |= {name: torch.tensor(number) for name, number in numbers.items() if number}


class _Places:
    """Where the rows of a batch's calls are, and tensors of each call's own, as a model hands them over.

    Parts of one allocation would begin at places that happen to be the same, which torch goes by.

    Args:
        batch_run: whose calls.
    """

    def __init__(self, batch_run: BatchRun) -> None:
        self._batch_run, self._inputs = batch_run, batch_run.inputs()
        self._keys = borders(batch_run.case.packed_key_lengths)
        self._tensors: dict[int, BatchTensors] = {}

    def rows(self, name: str, index: int) -> slice:
        """Those of a call in an input or a result."""
        begin, end = self._batch_run.batch.spans[index]
        if name in ("k", "v", "dk", "dv"):
            return slice(self._keys[begin], self._keys[end])
        return slice(*self._batch_run.batch.tokens[index])

    def call(self, index: int) -> Call:
        """A call in tensors of its own, the same each time."""
        if (tensors := self._tensors.get(index)) is None:
            own = Inputs(**{name: x[self.rows(name, index)] for name, x in self._inputs.named.items()})
            case = self._batch_run.batch.call(index)
            tensors = self._tensors[index] = self._batch_run.load(CallBatch.of_one(case), own)
        return Call(tensors, 0, self._batch_run.backend)


class _Inside:
    """Calls of a batch inside what torch compiles, or around them or in a module as they are.

    Args:
        batch_run: whose calls.
        places: of these.
    """

    def __init__(self, batch_run: BatchRun, places: _Places) -> None:
        self.batch_run, self.places = batch_run, places
        self.results = {name: x.clone() for name, x in batch_run.first.items()}
        """What they gave there; of others what they gave in the batch."""
        self.found = torch.zeros(len(batch_run.case.packed_lengths), dtype=torch.bool, device=batch_run.device)
        """Documents of calls that gave other results than asked for."""
        self.failed = BatchResult()
        self.begun = 0
        """The call that was begun last."""
        self.ran: list[int] = []
        """Calls of which something ran compiled."""
        self.as_they_are = 0
        """Calls of which nothing did."""

    def run(self, compiled: Compiled, calls: Iterable[int], graphs: int) -> None:
        """Runs calls one after another.

        Args:
            compiled: what they are run in.
            calls: which of them.
            graphs: how many are compiled, after which no more are.

        Raises:
            NotTraceable: where torch's compiler does not take one.
        """
        for index in calls:
            self.batch_run.beat()
            self.begun, call = index, self.places.call(index)
            try:
                ran = compiled.run(call, more=compiled.graphs < graphs)
                self._take(index, call)
            except NotTraceable:
                raise
            except (NotCompiledYet, UnsupportedCase, NotImplementedError):
                continue
            except Exception as error:
                raise_lack_of_memory(error)
                self.failed.broken[index] = in_words(error)
                continue
            if ran:
                self.ran.append(index)
            else:
                self.as_they_are += 1

    def _take(self, index: int, call: Call) -> None:
        """Puts what a call gave in its place."""
        got = call.results()
        if "lse" in got:
            got["lse"] = in_our_convention(got["lse"], self.batch_run.backend, self.batch_run.device)
        for name, results in self.results.items():
            own = results[self.places.rows(name, index)]
            x = call.tensors.parted(name, 0, got[name])[0] if name in got else None
            if x is None or x.shape != own.shape or x.dtype != own.dtype:
                self.found[slice(*self.batch_run.batch.spans[index])] = True
            else:
                own.copy_(x)

    def wrong(self, way: single.Way) -> torch.Tensor:
        """Documents whose results have other bits than those of the calls as they are, where bits are promised and the
        arithmetic is the same, or are beyond budgets that those keep: bool ``[documents]``."""
        batch_run, case = self.batch_run, self.batch_run.case
        as_it_is = _Inside(batch_run, self.places)
        as_it_is.run(way.as_it_is(batch_run.backend), self.ran, GRAPHS[False])
        usual = as_it_is.results
        z = largest_z(case, batch_run.inputs(), batch_run.profile, [usual, self.results])
        before, after = (z > limit(case)).any(2)
        found = self.found | (after & ~before)
        # Code of its own may keep in float32 what a kernel written in Python rounds.
        return found if way.generated else found | self._moved(usual)

    def _moved(self, usual: Results) -> torch.Tensor:
        """Documents with other bits, of calls that multiply no matrices themselves."""
        batch_run = self.batch_run
        moved = other_bits(batch_run.case, usual, self.results, batch_run.promised)
        for index in self.ran:
            own = moved[slice(*batch_run.batch.spans[index])]
            if own.any() and single.multiplies(self.places.call(index)):
                own.fill_(False)
        return moved
