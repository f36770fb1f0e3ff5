"""Calls captured in CUDA graphs and replayed, and calls between streams: on a CPU by doubles of both."""

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
from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.interfering import turned
from attn_fuzz.oracle.checks import graphs, streams
from attn_fuzz.oracle.symptoms import NotOrdered, NotReplayed, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

CASE = Case(level="kernel", lengths=(5, 2, 3), heads=2, head_dim=8)
DTYPES = ("fp32", "bf16")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    fake = FakeRecorder()
    monkeypatch.setattr(graphs, "recorder_of", lambda device: fake)
    monkeypatch.setattr(graphs, "_failed", {})
    return fake


def asked(kernel: Backup, case: Case = CASE, device: str = "cpu") -> tuple[list[Symptom], Trial]:
    trial = Trial(case, Backend(kernel.name, kernel, levels=("kernel",)), torch.device(device), interfered=False)
    return list(graphs.replayed_alike(trial)), trial


def promising(kernel: Backup) -> Backup:
    kernel.capabilities = dataclasses.replace(kernel.capabilities, graphs=True)  # type: ignore[misc]
    return kernel


# Graphs.


def test_all_that_a_host_knows_stays_when_documents_are_turned() -> None:
    case = CASE.replace(key_lengths=(7, 2, 4))
    other = turned(case)
    pairs = [sorted(zip(each.packed_lengths, each.packed_key_lengths, strict=True)) for each in (case, other)]
    assert pairs[0] == pairs[1]
    assert other.lengths == (2, 3, 5)
    assert other.seed != case.seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(5, 2, 3), (4,), (1, 3)])
def test_a_kernel_that_goes_by_its_tensors_is_clean(
    recorder: FakeRecorder, dtype: str, lengths: tuple[int, ...]
) -> None:
    found, trial = asked(OnDevice(), CASE.replace(dtype=dtype, lengths=lengths))
    assert found == []
    assert trial.counted == {graphs.REPLAYED: 1, graphs.BACKWARD: 1}
    # Two graphs in either order; of one document there is no smaller call.
    assert recorder.captured == (4 if len(lengths) > 1 else 1)


def test_what_compiles_for_shapes_is_captured_by_itself(recorder: FakeRecorder) -> None:
    def of_shapes(kernel: Backup) -> Backup:
        kernel.capabilities = dataclasses.replace(kernel.capabilities, layouts=4)  # type: ignore[misc]
        return kernel

    found, trial = asked(of_shapes(OnDevice()))
    assert (found, recorder.captured) == ([], 1)
    assert trial.counted == {graphs.REPLAYED: 1, graphs.BACKWARD: 1}
    assert asked(of_shapes(BakesLengths()))[0]


def test_what_torch_compiles_is_not_captured(recorder: FakeRecorder) -> None:
    kernel = BakesLengths()
    kernel.compiled = True  # type: ignore[misc]
    assert (asked(kernel)[0], recorder.captured) == ([], 0)


@pytest.mark.parametrize("kernel", [BakesLengths, ScaleOfCapture, SharedWorkspace])
def test_what_is_kept_from_the_capture_is_seen(recorder: FakeRecorder, kernel: type[OnDevice]) -> None:
    found, _ = asked(kernel())
    assert found
    assert all(isinstance(symptom, NotReplayed) and symptom.element is not None for symptom in found)
    assert "captured with 2/2, 3/3, 5/5 queries/keys and replayed with 5/5, 2/2, 3/3" in found[0].message


def test_a_workspace_is_seen_only_beside_another_graph(recorder: FakeRecorder) -> None:
    found, _ = asked(SharedWorkspace(), CASE.replace(lengths=(4,)))
    assert found == []


def test_what_reads_on_the_host_is_refused_and_said(recorder: FakeRecorder) -> None:
    kernel = ReadsOnHost()
    for _ in range(5):
        found, trial = asked(kernel)
        assert found == []
        ((words, number),) = trial.counted.items()
        assert words.startswith("not captured in a CUDA graph (aten._local_scalar_dense")
        assert number == 1
    # With a backward and without one, three times each: then nobody asks any more.
    assert [len(why) for why in graphs._failed.values()] == [3, 3]
    assert recorder.captured == 0


def test_a_backward_that_cannot_be_captured_leaves_the_forward(recorder: FakeRecorder) -> None:
    found, trial = asked(ReadsInBackward())
    assert found == []
    assert trial.counted == {graphs.REPLAYED: 1, graphs.BACKWARD: 0}


def test_a_promise_to_be_captured_is_held_to(recorder: FakeRecorder) -> None:
    found, _ = asked(promising(ReadsOnHost()))
    assert [symptom.tensor for symptom in found] == ["call"]
    assert "cannot be captured" in found[0].message
    assert asked(promising(OnDevice()))[0] == []


def test_without_a_recorder_nothing_is_asked() -> None:
    found, trial = asked(BakesLengths())
    assert (found, dict(trial.counted)) == ([], {})


# Streams.


def ordered(monkeypatch: pytest.MonkeyPatch, kernel: Backup) -> tuple[list[Symptom], Trial]:
    monkeypatch.setattr(streams, "streams_of", lambda device: FakeStreams())
    trial = Trial(CASE, Backend(kernel.name, kernel, levels=("kernel",)), torch.device("cpu"), interfered=False)
    return list(streams.ordered_by_streams(trial)), trial


def test_a_kernel_on_the_current_stream_has_late_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    found, trial = ordered(monkeypatch, OnDevice())
    assert found == []
    assert trial.counted == {streams.ORDERED: 1}


def test_a_kernel_on_another_stream_has_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = ordered(monkeypatch, Backup())
    assert {type(symptom) for symptom in found} == {NotOrdered}
    assert {symptom.tensor for symptom in found} >= {"out", "dq", "dk"}


# The same on a GPU.


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_graphs_of_a_kernel_that_goes_by_its_tensors_are_clean(dtype: str) -> None:
    found, trial = asked(OnDevice(), CASE.replace(dtype=dtype), "cuda")
    assert found == []
    assert trial.counted == {graphs.REPLAYED: 1, graphs.BACKWARD: 1}


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("kernel", [BakesLengths, SharedWorkspace])
def test_real_graphs_keep_what_was_captured(kernel: type[OnDevice]) -> None:
    found, trial = asked(kernel(), device="cuda")
    # Prefix sums that are copied from a host's memory cannot be captured, either.
    assert found or any(words.startswith(graphs.REFUSED) for words in trial.counted)
    assert all(isinstance(symptom, NotReplayed) for symptom in found)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("kernel", [ReadsOnHost, ReadsInBackward])
def test_what_waits_for_a_gpu_is_refused_and_the_gpu_goes_on(kernel: type[OnDevice]) -> None:
    graphs._failed.clear()
    found, trial = asked(kernel(), device="cuda")
    assert found == []
    assert trial.counted
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert asked(OnDevice(), device="cuda")[0] == []


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(("kernel", "clean"), [(OnDevice, True), (OnDefaultStream, False)])
def test_real_streams(kernel: type[OnDevice], clean: bool) -> None:
    wide = CASE.replace(lengths=(300, 200), head_dim=64, heads=4)
    trial = Trial(wide, Backend(kernel.name, kernel(), levels=("kernel",)), torch.device("cuda"), interfered=False)
    assert bool(list(streams.ordered_by_streams(trial))) is not clean
