"""Batches asked for CUDA graphs and streams: on a CPU by doubles of both, and what single calls do not show."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from devices import needs_cuda
from launched_kernels import (
    BakesLengths,
    OnDefaultStream,
    OnDevice,
    ReadsInBackward,
    ReadsOnHost,
    ScaleOfCapture,
    SharedWorkspace,
)
from recorded import FakeRecorder, FakeStreams

from attn_fuzz.backends.kernels.backup import Backup
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch import launched
from attn_fuzz.batch.batch_run import GRAPHS, STREAMS
from attn_fuzz.batch.judge import LAUNCHED, judge, schedule_on
from attn_fuzz.batch.judged import Judged
from attn_fuzz.campaign.calls_worker import CallsWorker
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.graphs import recorder_of
from attn_fuzz.execution.streams import streams_of
from attn_fuzz.oracle.checks import graphs, streams
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.symptoms import NotOrdered, NotReplayed
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

BATCH = CallBatch(Case(level="kernel", lengths=(5, 2, 3, 4, 1, 6, 7), heads=2, head_dim=8, dtype="bf16"), (3, 4, 6, 7))
STREAMS_ASKED, GRAPHS_ASKED = LAUNCHED


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_failed", {})
    monkeypatch.setattr(launched, "recorder_of", lambda device: recorder_of(device) or FakeRecorder())
    monkeypatch.setattr(launched, "streams_of", lambda device: streams_of(device) or FakeStreams())


def judged(kernel: Backup, question: object, device: str = "cpu", batch: CallBatch = BATCH) -> Judged:
    assert question in LAUNCHED
    return judge(batch, Backend(kernel.name, kernel, levels=("kernel",)), torch.device(device), question)  # type: ignore[arg-type]


def accused(found: Judged, column: str = GRAPHS) -> set[int]:
    """Calls that are accused in a column."""
    assert not found.broken
    beyond = (found.z[:, found.names.index(column)] > LIMIT).nonzero()[:, 0].tolist()
    return {found.call_of(document) for document in beyond}


def test_a_kernel_that_goes_by_its_tensors_is_clean() -> None:
    assert judged(OnDevice(), STREAMS_ASKED).counted == {streams.ORDERED: 4}
    found = judged(OnDevice(), GRAPHS_ASKED)
    assert found.counted == {graphs.REPLAYED: 4, graphs.BACKWARD: 4}
    assert not found.failing()


@pytest.mark.parametrize("kernel", [BakesLengths, ScaleOfCapture])
def test_what_is_kept_from_a_capture_is_seen(kernel: type[OnDevice]) -> None:
    found = judged(kernel(), GRAPHS_ASKED)
    # Of one document there is no other layout, but there are other values.
    assert accused(found) == ({0, 2} if kernel is BakesLengths else {0, 1, 2, 3})
    assert found.symptom(GRAPHS) is NotReplayed


def test_graphs_of_one_pool_keep_apart() -> None:
    # What the last graph left is there.
    assert accused(judged(SharedWorkspace(), GRAPHS_ASKED)) == {0, 1, 2}


def test_what_reads_on_the_host_is_refused_and_said() -> None:
    kernel = ReadsOnHost()
    (words,) = judged(kernel, GRAPHS_ASKED).counted
    assert words.startswith(graphs.REFUSED)
    kernel.capabilities = dataclasses.replace(kernel.capabilities, graphs=True)  # type: ignore[misc]
    assert accused(judged(kernel, GRAPHS_ASKED)) == {0, 1, 2, 3}


def test_a_backward_that_cannot_be_captured_leaves_the_forward() -> None:
    found = judged(ReadsInBackward(), GRAPHS_ASKED)
    assert found.counted == {graphs.REPLAYED: 4, graphs.BACKWARD: 0}
    assert not found.failing()


def test_a_kernel_on_another_stream_has_what_was_there_before() -> None:
    found = judged(Backup(), STREAMS_ASKED)
    assert {name for z, name in found.worst() if z > 10} == {STREAMS}
    assert found.symptom(STREAMS) is NotOrdered


def test_only_gpus_are_asked() -> None:
    assert {*schedule_on("cuda")} - {*schedule_on("cpu")} == {*LAUNCHED}
    job = Assignment(backend="loop", device="cpu", seed=0, levels=("kernel",), mode="batch")
    assert not {*LAUNCHED} & {*CallsWorker(job, lambda message: None).schedule}


WIDE = CallBatch(
    Case(level="kernel", lengths=(300, 200, 17, 64, 128, 1, 90, 33), heads=4, head_dim=64, dtype="bf16"), (3, 4, 6, 8)
)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(("kernel", "wrong"), [(OnDevice, False), (OnDefaultStream, True)])
def test_real_streams(kernel: type[OnDevice], wrong: bool) -> None:
    found = judged(kernel(), STREAMS_ASKED, "cuda", WIDE)
    assert not found.broken
    assert bool(found.failing()) is wrong


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(("kernel", "wrong"), [(OnDevice, False), (SharedWorkspace, True)])
def test_real_graphs(kernel: type[OnDevice], wrong: bool) -> None:
    found = judged(kernel(), GRAPHS_ASKED, "cuda", WIDE)
    assert not found.broken
    assert found.counted[graphs.REPLAYED] == 4
    assert bool(found.failing()) is wrong


@pytest.mark.parametrize(("memory", "launched_otherwise"), [("contiguous", True), ("far_rows", False)])
def test_what_takes_gigabytes_is_not_launched_otherwise(
    memory: str, launched_otherwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, cpu = LoopKernel(), torch.device("cpu")
    kernel.capabilities = dataclasses.replace(kernel.capabilities, graphs=None)  # type: ignore[misc]
    backend = Backend("loop", kernel, levels=("kernel",))
    case = Case(level="kernel", lengths=(2, 1), memory=memory)
    assert graphs.capturable(case, backend, cpu) is launched_otherwise
    monkeypatch.setattr(streams, "streams_of", lambda device: FakeStreams())
    trial = Trial(case, backend, cpu)
    list(streams.ordered_by_streams(trial))
    assert trial.counted == ({streams.ORDERED: 1} if launched_otherwise else {})
