"""A batch's calls launched otherwise: between streams, all of them in flight at once; and captured in CUDA graphs."""

from __future__ import annotations

import itertools
from typing import Final

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.batch.batch_run import GRAPHS, STREAMS, BatchRun, Results
from attn_fuzz.batch.verdicts import largest_z, other_bits
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.interfering import turned
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import Asked, BatchResult, How
from attn_fuzz.execution.graphs import NotCapturable, Recorder, Replay, recorder_of
from attn_fuzz.execution.process import in_words, raise_lack_of_memory
from attn_fuzz.execution.static_call import StaticCall
from attn_fuzz.execution.streams import streams_of
from attn_fuzz.oracle.checks.graphs import BACKWARD, REFUSED, REPLAYED, attempted, capturable
from attn_fuzz.oracle.checks.streams import ORDERED
from attn_fuzz.oracle.deviations import limit
from attn_fuzz.oracle.relations.launched import ONE_AT_A_TIME, spoiled
from attn_fuzz.reference.answer import kernel_inputs

CAPTURED: Final = 8
"""Calls of a batch that are captured at most: each takes four runs, and up to 100 ms beside fifteen other processes."""


def ordered_by_streams(batch_run: BatchRun) -> None:
    """Inputs of all calls come late from one stream, the calls run one by one on a second, a third takes results."""
    streams, batch, device = streams_of(batch_run.device), batch_run.batch, batch_run.device
    stated = batch_run.backend.kernel.capabilities_on(device.type)
    if streams is None or batch.case.memory in ONE_AT_A_TIME or not stated.streams:
        return
    drawn = batch_run.inputs()
    static, before, after = (
        BatchTensors.of(batch_run.backend, batch, each, device) for each in (spoiled(drawn), drawn, spoiled(drawn))
    )
    got = Results()

    def calls() -> None:
        got.update(batch_run.run(static, batch_run.other_poison, How(threaded=True)))
        # Nothing of the calls may still read these.
        static.copy_in(after)

    streams.warm_up(calls)
    # Its memory is given to the calls again.
    batch_run.runs.pop()
    got.clear()
    streams.late(lambda: static.copy_in(before), len(batch.ends))
    streams.call(calls)
    results = streams.take(lambda: {name: x.clone() for name, x in got.items()})
    batch_run.counted[ORDERED] = torch.tensor(len(batch.ends))
    batch_run.hold(results)
    if names := batch_run.promised:
        batch_run.accuse(STREAMS, other_bits(batch_run.case, batch_run.first, results, names))


def replayed_alike(batch_run: BatchRun) -> None:
    """Some calls, each captured with another layout of its size in memory that all graphs share, then all replayed."""
    recorder, backend, device = recorder_of(batch_run.device), batch_run.backend, batch_run.device
    if recorder is None:
        return
    calls = enumerate(batch_run.batch.calls)
    few = list(itertools.islice((i for i, call in calls if capturable(call, backend, device)), CAPTURED))
    if not few:
        return
    captured = _Captured(batch_run, recorder, few)
    try:
        asked, _ = attempted(backend, device, captured.run)
    except NotCapturable as refusal:
        batch_run.counted[f"{REFUSED} ({refusal})"] = torch.tensor(len(few))
        if backend.kernel.capabilities_on(device.type).graphs:
            batch_run.accuse(GRAPHS, captured.documents(few))
        return
    batch_run.counted[REPLAYED] = torch.tensor(len(captured.results))
    batch_run.counted[BACKWARD] = torch.tensor(len(captured.results) * bool(asked.gradients))
    batch_run.runs.append(captured.failed)
    batch_run.accuse(GRAPHS, captured.wrong(asked))


class _Captured:
    """Graphs of some calls.

    Args:
        batch_run: whose calls.
        recorder: what captures them.
        few: which of them.
    """

    def __init__(self, batch_run: BatchRun, recorder: Recorder, few: list[int]) -> None:
        self.batch_run, self.recorder, self.few = batch_run, recorder, few
        self.failed = BatchResult()
        """What was raised, by call."""
        self.results: dict[int, Results] = {}
        """What replays gave, by call."""

    def run(self, asked: Asked) -> None:
        """Captures all of them, one after another, then replays them in that order.

        Raises:
            NotCapturable: where one cannot be captured.
        """
        self.failed, self.results = BatchResult(), {}
        pool, graphs = self.recorder.pool(), list[tuple[int, StaticCall, Replay]]()
        poison = self.batch_run.other_poison
        for index in self.few:
            self.batch_run.beat()
            case, device = self.batch_run.batch.call(index), self.batch_run.device
            other = turned(case)
            drawn = kernel_inputs(other, device)
            try:
                # Made for the other layout, and filled with the call's own when that has been captured.
                call = StaticCall(self.batch_run.backend, other, drawn, poison, device, asked)
                replay = self.recorder.capture(call.run, pool)
                inputs, backend = kernel_inputs(case, device), self.batch_run.backend
                call.load(BatchTensors.of(backend, CallBatch.of_one(case), inputs, device, poison=poison))
                graphs.append((index, call, replay))
            except NotCapturable:
                raise
            except (UnsupportedCase, NotImplementedError):
                continue
            except Exception as error:
                raise_lack_of_memory(error)
                self.failed.broken[index] = in_words(error)
        for _, _, replay in graphs:
            replay()
        self.results = {index: call.observe().results for index, call, _ in graphs}

    def documents(self, calls: list[int]) -> torch.Tensor:
        """Those of some calls: bool ``[documents]``."""
        found = torch.zeros(len(self.batch_run.case.packed_lengths), dtype=torch.bool, device=self.batch_run.device)
        for index in calls:
            found[slice(*self.batch_run.batch.spans[index])] = True
        return found

    def wrong(self, asked: Asked) -> torch.Tensor:
        """Documents whose results have other bits than those of the calls as they are usually made, where bits are
        promised, or are beyond their budgets: bool ``[documents]``."""
        batch_run, found = self.batch_run, self.documents([])
        for index, results in self.results.items():
            case, place = batch_run.batch.call(index), slice(*batch_run.batch.spans[index])
            drawn = kernel_inputs(case, batch_run.device)
            tensors = batch_run.load(CallBatch.of_one(case), drawn)
            usual = batch_run.run_batch(tensors, batch_run.other_poison, How(asked), every=True)
            # Its calls have numbers of their own, and what they raise by themselves is the case mode's.
            batch_run.runs.pop()
            got = {name: x.to(batch_run.device) for name, x in results.items()}
            if usual.broken or usual.refused:
                continue
            if any(name not in got or got[name].shape != x.shape for name, x in usual.results.items()):
                found[place] = True
                continue
            z = largest_z(case, drawn, batch_run.profile, [got])[0]
            found[place] = (z > limit(case)).any(1) | other_bits(case, usual.results, got, batch_run.promised)
        return found
