"""The packed mode ends in time: no call is made that would not, however slow the backend is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch import batch_size
from attn_fuzz.batch.batch_run import NAMES
from attn_fuzz.batch.batch_size import masks_whole_pack, pads_to_longest
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.campaign import packed_worker
from attn_fuzz.campaign.call_times import CallTimes
from attn_fuzz.campaign.messages import Assignment, Finished, Message, Trying
from attn_fuzz.campaign.packed_worker import CROWD, work_on_packed
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.runner import KernelCall
from attn_fuzz.generation.length_sweeps import LONGEST
from attn_fuzz.generation.strategies import Domain
from attn_fuzz.reference.case import Case

LOOP = registry.load("loop")
DOMAIN = Domain.of(LOOP.kernel.capabilities_on("cpu"), "cpu")
LONGEST_QUERIES = max(queries for queries, _ in LONGEST["cpu"])


class Clock:
    """Time that passes where it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def padded(case: Case) -> float:
    """Seconds that a kernel takes which gives every document the rows of the longest, and some for launching."""
    scores = len(case.packed_lengths) * max(case.packed_lengths) * max(case.packed_key_lengths)
    return 0.05 + 2e-10 * scores * case.heads * case.head_dim


def slow(case: Case) -> float:
    """Seconds that a kernel takes which computes documents one after another, and not fast."""
    return 0.02 * len(case.packed_lengths)


def quick(case: Case) -> float:
    """Seconds that a kernel takes for which a thousand documents are nothing."""
    return 1e-5 * len(case.packed_lengths)


def tried(cost: Callable[[Case], float], seconds: float, patch: pytest.MonkeyPatch) -> tuple[list[Case], float]:
    """Cases of a campaign of so many seconds, judged in no time but what they cost; and when it ended."""
    clock = Clock()

    def judge(
        case: Case, backend: Backend, device: torch.device, question: Question, beat: Callable[[], None]
    ) -> Judged:
        clock.seconds += cost(case)
        nothing = torch.zeros(len(case.packed_lengths), len(NAMES), dtype=torch.float64)
        return Judged(CallBatch.of_one(case), nothing, question)

    patch.setattr(registry, "load", lambda name: Backend(name, LoopKernel()))
    patch.setattr(packed_worker, "judge_packed", judge)
    patch.setattr(packed_worker, "masks_whole_pack", lambda *_: False)
    patch.setattr(packed_worker, "pads_to_longest", lambda *_: cost is padded)
    patch.setattr("attn_fuzz.campaign.batch_worker.now", lambda device: clock.seconds)
    patch.setattr("time.monotonic", clock)
    messages: list[Message] = []
    work_on_packed(Assignment(backend="mine", device="cpu", seed=0, seconds=seconds), messages.append)
    assert isinstance(messages[-1], Finished)
    return [Case.from_json(each.case) for each in messages if isinstance(each, Trying)], clock.seconds


@functools.cache
def in_ten_seconds(cost: Callable[[Case], float]) -> tuple[list[Case], float]:
    """Cases of a campaign of ten seconds, and when it ended."""
    with pytest.MonkeyPatch.context() as patch:
        return tried(cost, 10.0, patch)


@pytest.mark.parametrize("cost", [padded, slow])
def test_a_campaign_on_a_slow_backend_ends_in_time(cost: Callable[[Case], float]) -> None:
    cases, ended = in_ten_seconds(cost)
    assert len(cases) > 4
    assert 10.0 <= ended < 12.0


def test_no_document_is_long_where_all_are_padded_to_it() -> None:
    cases, _ = in_ten_seconds(padded)
    assert max(max(case.lengths) for case in cases if case.level == "kernel") <= LONGEST_QUERIES


def test_a_quick_backend_has_its_crowds_and_its_long_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_worker, "SIZING", packed_worker.Sizing(first=8, most=16, seconds=0.5))
    cases, _ = tried(quick, 0.1, monkeypatch)
    kernel_cases = [case for case in cases if case.level == "kernel"]
    assert max(len(case.lengths) for case in kernel_cases) >= CROWD
    assert max(max(case.lengths) for case in kernel_cases) > LONGEST_QUERIES


def test_a_slow_backend_has_no_crowd_that_ends_too_late() -> None:
    cases, _ = in_ten_seconds(slow)
    assert max(len(case.lengths) for case in cases) < CROWD


def test_wide_calls_are_taken_to_cost_more_and_narrow_ones_no_less() -> None:
    times = CallTimes()
    case = Case(level="kernel", lengths=(3,) * 100, heads=2, kv_heads=2, head_dim=8)
    wide, narrow = case.replace(heads=8, kv_heads=8), case.replace(heads=1, kv_heads=1)
    assert times.most_documents("a", case, 0.5) == 100
    assert not times.fits("a", case, 1e9)
    times.note("a", case, 2.0)
    assert times.most_documents("a", case, 1.5) == 75
    assert times.most_documents("a", wide, 4.0) == 50
    assert times.most_documents("a", narrow, 1.5) == 75
    assert times.fits("a", case, 2.0)
    assert not times.fits("a", wide, 7.0)
    assert times.most_documents("b", case, 0.5) == 100
    # However little time is left, and whatever is left to do: a call of something.
    assert times.most_documents("a", case, -3.0) == 50
    times.note("a", case, 2000.0)
    assert times.most_documents("a", case, 1.0) == 1


# How a kernel's time grows.

OF_TIME = {
    "documents apart": (lambda case: sum(case.lengths), False, False),
    "masks over the pack": (lambda case: sum(case.lengths) ** 2, True, False),
    "padding": (lambda case: len(case.lengths) * max(case.lengths), False, True),
}


@pytest.mark.parametrize("what", OF_TIME)
def test_how_time_grows_tells_what_a_kernel_does(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, masks, pads = OF_TIME[what]
    monkeypatch.setattr(batch_size, "_largest_made", lambda call: 0)
    monkeypatch.setattr(batch_size, "_seconds", lambda call: float(cost(call.case)))
    assert masks_whole_pack(LOOP, DOMAIN) is masks
    if not masks:
        assert pads_to_longest(LOOP, DOMAIN) is pads


def test_one_quick_call_of_several_tells_that_nothing_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other work a call takes longer than it should, and never less."""
    calls: list[int] = []

    def seconds(call: KernelCall) -> float:
        calls.append(len(call.case.lengths))
        disturbed = len(calls) % 2
        return len(call.case.lengths) * (9.0 if disturbed else 1.0)

    monkeypatch.setattr(batch_size, "_largest_made", lambda call: 0)
    monkeypatch.setattr(batch_size, "_seconds", seconds)
    assert not masks_whole_pack(LOOP, DOMAIN)
    assert len([count for count in calls if count == max(calls)]) < 3


@pytest.mark.slow
def test_a_kernel_that_pads_is_known_by_its_time() -> None:
    backend = registry.load("sdpa_nested_math")
    assert pads_to_longest(backend, Domain.of(backend.kernel.capabilities_on("cpu"), "cpu"))
