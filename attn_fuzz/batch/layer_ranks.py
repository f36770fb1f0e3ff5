"""A batch of layer calls over ranks: each rank runs its slice of every call, and here the whole is put together.

Ranks are asked for all calls of a batch at once, since each question wakes every process up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attn_fuzz.backends.output import first_mismatch
from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.interfering import interfering_call
from attn_fuzz.execution.failures import note_failure
from attn_fuzz.execution.layer_calls import LayerHow, LayerResults, arenas_of, collect
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.process import in_words, raise_lack_of_memory
from attn_fuzz.oracle.checks.ranks import alive_rows, attended
from attn_fuzz.ranks.gather import RankCall, run_calls
from attn_fuzz.ranks.rank_group import RankFailed, RanksHung
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.memory import bits

NOT_RUN = "ranks hung in a call before it"


class CallsOnRanks:
    """The tensors of calls that ranks run: each rank places its own.

    Args:
        batch: what will run, on several ranks.
        inputs: tensors of its packed case, ``[tokens, hidden]``.
        device: of the first rank.
        poison: what gaps and guard margins hold.
    """

    def __init__(self, batch: CallBatch, inputs: LayerInputs, device: torch.device, poison: str) -> None:
        self.batch, self.device, self.poison, self.weights = batch, device, poison, inputs.weights
        # Handed over once in a message, however many calls share them.
        weights = {name: weight.cpu() for name, weight in inputs.weights.items()}
        self._inputs = LayerInputs(inputs.x.cpu(), inputs.dout.cpu(), weights)
        self.touched = False
        """Whether some rank has found an input, a weight or a guard margin changed."""

    def of_call(self, index: int) -> LayerInputs:
        """A call's own rows."""
        rows = slice(*self.batch.tokens[index])
        return LayerInputs(self._inputs.x[rows].clone(), self._inputs.dout[rows].clone(), self._inputs.weights)

    def changed(self) -> torch.Tensor:
        """Whether anything has, as a tensor on the device."""
        return torch.tensor(self.touched, device=self.device)


def run_on_ranks(
    tensors: CallsOnRanks,
    backend: Backend,
    cases: Sequence[Case],
    poison: str,
    how: LayerHow,
    beat: Callable[[], None] = lambda: None,
) -> LayerResults:
    """Forward and backward of every call, one after another, on all ranks; as ``run_layer_calls`` does on one.

    Where something goes wrong in a call, they are asked for one by one: whose doing it is tells that. What ranks have
    raised after other calls only is the last call's.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    device, found = tensors.device, LayerResults()
    calls = {
        index: RankCall(
            cases[index],
            tensors.of_call(index),
            interfering_call(cases[index], backend, device.type) if own.interfered else None,
        )
        for order, own in how.parts(len(cases))
        for index in order
    }
    observed: dict[int, Observation] = {}
    beat()
    try:
        observed = dict(zip(calls, run_calls(backend, [*calls.values()], poison, device), strict=True))
    except Exception as error:
        raise_lack_of_memory(error)
        _one_by_one(found, observed, calls, lambda call: run_calls(backend, [call], poison, device)[0], beat)
        if len(observed) == len(calls) and isinstance(error, RankFailed):
            # Not silence: on a busy machine all calls together may take too long.
            found.broken[next(reversed(calls))] = in_words(error)
    got: list[dict[str, torch.Tensor]] = [{} for _ in cases]
    meant = backend.kernel.paths_on(device.type)
    for index, one in observed.items():
        got[index] = {name: x.to(device) for name, x in one.results.items()}
        tensors.touched |= bool(one.changed)
        _note(found, index, cases[index], one, meant)
    collect(found, got, cases, tensors.batch.case, arenas_of(cases, tensors.batch.case, tensors.weights))
    return found


def _one_by_one(
    found: LayerResults,
    observed: dict[int, Observation],
    calls: dict[int, RankCall],
    run: Callable[[RankCall], Observation],
    beat: Callable[[], None],
) -> None:
    """Runs each call by itself; those that come to nothing are told in words."""
    hung = False
    for index, call in calls.items():
        beat()
        if hung:
            # Each further one might take as long.
            found.refused[index] = NOT_RUN
            continue
        try:
            observed[index] = run(call)
        except Exception as error:
            note_failure(found, index, error)
            hung = isinstance(error, RanksHung)


def _note(found: LayerResults, index: int, case: Case, one: Observation, meant: frozenset[str]) -> None:
    """Writes down what an observation says beside its results."""
    found.paths |= one.paths
    if one.strays:
        stray = one.strays[0]
        found.strayed[index] = f"the {stray.step} changed rows {list(stray.rows)[:8]} of {stray.tensor}"
    if wrong := sorted(one.paths - meant) if meant else []:
        found.broken[index] = f"{wrong[0]!r} ran, but should be {' or '.join(sorted(meant))}"
    if _unlike(one):
        found.unlike.add(index)
    if _alive(case, one):
        found.alive.add(index)


def _unlike(one: Observation) -> bool:
    """Whether the K/V buffer, gathered from all ranks, has other bits on one of them."""
    for name in ("k", "v"):
        buffers = [buffers[name] for buffers in one.by_rank if name in buffers]
        for other in buffers[1:]:
            if first_mismatch(other, buffers[0]) or bool((bits(other) != bits(buffers[0])).any()):
                return True
    return False


def _alive(case: Case, one: Observation) -> bool:
    """Whether a rank's gradient buffer holds something in rows that none of its queries attended to, nor that it
    owns."""
    for rank, buffers in enumerate(one.by_rank):
        seen, owned = attended(case, rank)
        for name in ("dk", "dv"):
            got = buffers.get(name)
            if got is None or len(got) != case.tokens:
                continue
            if bool(alive_rows(got, seen, owned).any()):
                return True
    return False
