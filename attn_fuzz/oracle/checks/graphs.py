"""CUDA graphs: captured with one layout and replayed with another, alone and beside a graph of another size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.interfering import turned
from attn_fuzz.cases.smaller import fewer_documents
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import EVERYTHING, Asked
from attn_fuzz.execution.graphs import NotCapturable, Recorder, Replay, recorder_of
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.static_call import StaticCall
from attn_fuzz.oracle.relations.autograd import INFERENCE
from attn_fuzz.oracle.relations.launched import ONE_AT_A_TIME, unlike
from attn_fuzz.oracle.symptoms import NotReplayed, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs, kernel_inputs
from attn_fuzz.reference.case import Case

REPLAYED: Final = "calls captured in a CUDA graph and replayed"
BACKWARD: Final = "of these with their backward"
REFUSED: Final = "not captured in a CUDA graph"

_ENOUGH: Final = 3
"""Captures that failed, after which a backend is asked no more in this process: each leaves something behind."""

_Got = TypeVar("_Got")

_failed: dict[tuple[str, str, Asked], list[str]] = {}
"""Why captures failed, by backend, device and what was asked."""


def replayed_alike(trial: Trial) -> Iterator[Symptom]:
    """A graph that was captured with another layout of the same size gives the case's bits when it is replayed."""
    case, recorder = trial.case, recorder_of(trial.device)
    if recorder is None or not capturable(case, trial.backend, trial.device):
        return
    try:
        asked, found = attempted(trial.backend, trial.device, lambda asked: list(_replayed(trial, recorder, asked)))
    except NotCapturable as refusal:
        if trial.stated.graphs:
            yield NotReplayed("graphs", "call", f"it cannot be captured in a CUDA graph: {refusal}")
        else:
            trial.counted[f"{REFUSED} ({refusal})"] += 1
        return
    trial.counted[REPLAYED] += 1
    trial.counted[BACKWARD] += bool(asked.gradients)
    yield from found


def capturable(case: Case, backend: Backend, device: torch.device) -> bool:
    """Whether a case is one that may be captured with another layout of its size.

    Args:
        case: that is taken.
        backend: what would run it.
        device: where.
    """
    stated = backend.kernel.capabilities_on(device.type)
    if case.level != "kernel" or stated.graphs is False or case.memory in ONE_AT_A_TIME:
        return False
    if case.gaps != (0, 0):
        # Where a document's rows lie then depends on the lengths of those before it, and results are read by them.
        return False
    # torch's compiler captures by itself. What compiles for shapes has met this one before it is captured.
    return not backend.kernel.compiled and backend.refusal(turned(case), device.type) is None


def attempted(backend: Backend, device: torch.device, capture: Callable[[Asked], _Got]) -> tuple[Asked, _Got]:
    """(what was asked of autograd, what a capture then gave): with a backward, or without where that cannot be.

    Args:
        backend: what is captured.
        device: where.
        capture: asks that of autograd.

    Raises:
        NotCapturable: where neither can be, or not all that is promised. Nobody is asked again after a few times.
    """
    stated = backend.kernel.capabilities_on(device.type)
    for asked in (EVERYTHING, INFERENCE) if stated.backward else (INFERENCE,):
        failed = _failed.setdefault((backend.name, str(device), asked), [])
        if len(failed) < _ENOUGH:
            try:
                return asked, capture(asked)
            except NotCapturable as refusal:
                failed.append(str(refusal))
        if stated.graphs:
            break
    raise NotCapturable(failed[-1])


@dataclasses.dataclass
class _Captured:
    """A graph of calls of one size."""

    trial: Trial
    usual: Observation
    call: StaticCall
    loaded: BatchTensors
    other: BatchTensors
    """The layout that it is captured with."""

    @classmethod
    def of(cls, trial: Trial, asked: Asked) -> _Captured:
        case, other, poison = trial.case, turned(trial.case), trial.poisons[0]
        assert isinstance(trial.inputs, Inputs)
        usual = trial.observe_with(trial.inputs, poison, asked=asked)
        drawn = kernel_inputs(other, "cpu")
        call = StaticCall(trial.backend, other, drawn, poison, trial.device, asked)
        loaded, first = (
            BatchTensors.of(trial.backend, CallBatch.of_one(each), inputs, trial.device, (each.capacity,), poison)
            for each, inputs in ((case, trial.inputs), (other, drawn))
        )
        return cls(trial, usual, call, loaded, first)

    def capture(self, recorder: Recorder, pool: Any) -> Replay:
        """Captures the other layout."""
        self.call.load(self.other)
        return recorder.capture(self.call.run, pool)

    def replayed(self, replay: Replay) -> Observation:
        """What the graph gives for the case."""
        self.call.load(self.loaded)
        replay()
        return self.call.observe()

    def compared(self, got: Observation, again: Callable[[], Observation], how: str) -> Iterator[Symptom]:
        """What a replay gave that the call does not give.

        Args:
            got: of a replay.
            again: replays once more.
            how: in words, what else there was.
        """
        for tensor, words, z, element in unlike(self.trial, self.usual, got, again):
            layouts = f"captured with {_words(self.call.case)} and replayed with {_words(self.trial.case)}{how}"
            yield NotReplayed("graphs", tensor, f"{layouts}: {words}", z=z, element=element)


def _replayed(trial: Trial, recorder: Recorder, asked: Asked) -> Iterator[Symptom]:
    """Two graphs share a pool, the larger one captured first and last; each is replayed after the other.

    One alone of what compiles for shapes, which would compile once more for fewer documents.
    """
    fewer = () if trial.stated.layouts else fewer_documents(trial.case)
    smaller = next((case for case in fewer if case is not None and _fits(trial, case)), None)
    graphs = [_Captured.of(trial, asked)]
    if smaller is not None:
        graphs.append(_Captured.of(dataclasses.replace(trial, case=smaller), asked))
    for order in (graphs, graphs[::-1])[: len(graphs)]:
        pool = recorder.pool()
        replays = [(graph, graph.capture(recorder, pool)) for graph in order]
        found = list(_told(replays))
        yield from found
        if found:
            return


def _fits(trial: Trial, case: Case) -> bool:
    taken = trial.backend.refusal(case, trial.device.type) is None
    return taken and capturable(case, trial.backend, trial.device)


def _told(replays: list[tuple[_Captured, Replay]]) -> Iterator[Symptom]:
    """What is wrong with replays in turn, twice over; and with results of the first graph once the other has run."""
    for turn, (graph, replay) in enumerate(2 * replays):
        beside = f", beside a graph of {_words(replays[(turn + 1) % 2][0].trial.case)}" if len(replays) > 1 else ""
        yield from graph.compared(graph.replayed(replay), functools.partial(graph.replayed, replay), beside)
        if turn and turn == len(replays) - 1:
            # Replayed in the order of their captures, graphs of one pool leave one another's results alone.
            kept = replays[0][0]
            yield from kept.compared(kept.call.observe(), kept.call.observe, " and then the other graph")


def _words(case: Case) -> str:
    """The documents of a case, the first few."""
    pairs = [f"{q}/{k}" for q, k in zip(case.packed_lengths, case.packed_key_lengths, strict=True)]
    return f"{', '.join(pairs[:8])}{', ...' if len(pairs) > 8 else ''} queries/keys"
