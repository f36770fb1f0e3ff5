"""Interfering calls: another case of the same shapes, as different as the backend takes, around the case under test."""

from __future__ import annotations

import dataclasses
import weakref
from typing import ClassVar

import pytest
import torch
from doubles import double, trial
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.loop import Call, Document, Loop
from attn_fuzz.cases.interfering import crossing, interfering_call
from attn_fuzz.cases.simpler import simpler_options
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.strategies import cases
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.trial import SECOND_SEED, Trial
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import LEVELS, Case
from attn_fuzz.reference.layer import LayerInputs

CPU = torch.device("cpu")
LOOP = registry.load("loop")
CASE = Case(level="kernel", lengths=(3, 5, 4), key_lengths=(3, 6, 9), seed=1)
CROSSED = CASE.replace(seed=5)


def shapes(case: Case) -> list[tuple[int, ...]]:
    """What a cache could be keyed on: shapes of all tensors, and how many documents there are."""
    inputs = Trial(case, LOOP, CPU).inputs
    tensors = [inputs.q, inputs.k, inputs.v] if isinstance(inputs, Inputs) else [inputs.x, *inputs.weights.values()]
    return [tuple(x.shape) for x in tensors] + [(len(case.packed_lengths), case.capacity, *case.cuts)]


@settings(max_examples=30, deadline=None)
@given(case=st.one_of(*(cases(level, Domain.of(Capabilities(), "cpu")) for level in LEVELS)))
def test_a_interfering_call_has_the_shapes_of_its_case_and_other_values(case: Case) -> None:
    other = interfering_call(case, LOOP, "cpu")
    assert other is not None
    assert other.seed != case.seed
    assert (other.level, other.dtype, other.cuts, other.padding) == (case.level, case.dtype, case.cuts, case.padding)
    assert sum(other.lengths) == sum(case.lengths)
    assert sum(other.packed_key_lengths) == sum(case.packed_key_lengths)
    assert shapes(other) == shapes(case)


def test_a_interfering_call_differs_in_all_that_may_be_forgotten() -> None:
    other = interfering_call(CASE, LOOP, "cpu")
    assert other is not None
    assert (other.lengths, other.key_lengths) == ((5, 4, 3), (9, 3, 6))
    assert other.softmax_scale != CASE.softmax_scale
    assert other.window != CASE.window
    assert other.memory != CASE.memory
    layer = interfering_call(Case(lengths=(2, 3), rotary="default"), LOOP, "cpu")
    assert layer is not None
    assert layer.rotary_theta != Case().rotary_theta


@pytest.mark.parametrize(
    ("lacks", "kept"),
    [({"window": False}, "window"), ({"scale": False}, "scale"), ({"memories": ("contiguous",)}, "memory")],
)
def test_a_interfering_call_asks_for_nothing_that_is_not_taken(lacks: dict[str, object], kept: str) -> None:
    backend = double(Loop(), **lacks)
    other = interfering_call(CASE, backend, "cpu")
    assert other is not None
    assert backend.refusal(other, "cpu") is None
    assert getattr(other, kept) == getattr(CASE, kept)
    assert other.seed != CASE.seed


def test_there_may_be_no_interfering_call() -> None:
    assert interfering_call(CASE, double(Loop(), dtypes=("bf16",)), "cpu") is None


class Notes(Loop):
    """Notes forwards and backwards in order, by the first value of Q."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(("forward", q[0, 0, 0].item()))
        return super().forward(call, q, k, v)

    def backward(
        self, call: Call, q: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.calls.append(("backward", q[0, 0, 0].item()))
        return super().backward(call, q, *rest)


NESTED_ORDER = [
    "forward interfering call",
    "forward case",
    "forward interfering call",
    "backward interfering call",
    "backward case",
]
CROSSED_ORDER = ["forward interfering call", "forward case", "backward interfering call", "backward case"]


@pytest.mark.parametrize(("case", "order"), [(CASE, NESTED_ORDER), (CROSSED, CROSSED_ORDER)])
def test_calls_of_an_interfering_call_come_before_the_forward_and_before_the_backward(
    case: Case, order: list[str]
) -> None:
    loop = Notes()
    probe = trial(loop, case)
    assert isinstance(probe.inputs, Inputs)
    own = probe.inputs.q[0, 0, 0].item()
    assert probe.observations
    who = [f"{step} {'case' if value == own else 'interfering call'}" for step, value in loop.calls]
    # Under the second poison the case is alone.
    assert who == [*order, "forward case", "backward case"]


class NotesLayer(BufferedLayer):
    """Notes forwards and backwards in order, by the weights."""

    calls: ClassVar[list[tuple[str, float]]] = []

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        self.calls.append(("forward", self.weights["query"][0, 0].item()))
        return super().forward(x, begin, end)

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        self.calls.append(("backward", self.weights["query"][0, 0].item()))
        return super().backward(dout)


@pytest.mark.parametrize(("seed", "order"), [(0, NESTED_ORDER), (4, CROSSED_ORDER)])
def test_so_do_sequences_of_an_interfering_call_each_of_them_whole(seed: int, order: list[str]) -> None:
    NotesLayer.calls.clear()
    case = Case(lengths=(3, 2), cuts=(2,), seed=seed)
    probe = Trial(case, dataclasses.replace(LOOP, layer=NotesLayer), CPU, ("nan",))
    assert isinstance(probe.inputs, LayerInputs)
    own = probe.inputs.weights["query"][0, 0].item()
    assert probe.observations
    who = [f"{step} {'case' if value == own else 'interfering call'}" for step, value in NotesLayer.calls]
    assert who == [step for step in order for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_half_of_the_drawn_cases_are_crossed(level: str) -> None:
    cases_of_level = [case for case in drawn(LOOP, 0, 80) if case.level == level]
    crossed = [case for case in cases_of_level if crossing(case)]
    assert 0.3 < len(crossed) / len(cases_of_level) < 0.7
    # With strides of their own and without.
    assert {case.seed % 2 for case in crossed} == {0, 1}


@pytest.mark.parametrize("seed", range(8))
def test_the_second_values_run_in_the_order_of_the_first(seed: int) -> None:
    assert crossing(CASE.replace(seed=seed ^ SECOND_SEED)) == crossing(CASE.replace(seed=seed))


def test_some_cases_of_ranks_are_crossed_and_some_are_not() -> None:
    ranks = [Trial(Case(lengths=(4,), ranks=2, seed=seed), LOOP, CPU) for seed in range(8)]
    assert {crossing(trial.case) for trial in ranks if trial.interferes} == {False, True}


def test_a_shrinker_tries_both_orders() -> None:
    for seed in (3, 7):
        case = Case(level="kernel", lengths=(2,), head_dim=1, seed=seed)
        tried = [other for other in simpler_options(case) if other is not None]
        assert {crossing(other) for other in tried if other.seed != seed} == {False, True}


class NotesMetadata(Loop):
    """Notes which of the prefix sums that it was handed before are still in memory."""

    def __init__(self) -> None:
        self.handed: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.alive.append(sum(handed() is not None for handed in self.handed))
        self.handed.append(weakref.ref(call.metadata.cu_seqlens_q))
        return super().forward(call, q, k, v)


def test_a_case_is_put_where_its_interfering_call_was() -> None:
    """What is kept by address is then the interfering call's: its tensors are gone when those of the case are made."""
    loop = NotesMetadata()
    assert trial(loop, CASE).observations
    assert loop.alive[1] == 0


def test_a_crossing_interfering_call_is_alive_beside_its_case() -> None:
    loop = NotesMetadata()
    assert trial(loop, CROSSED).observations
    assert loop.alive[1] == 1


class KeepsScale(Loop):
    """The scale of the first call of a shape serves all others."""

    def __init__(self) -> None:
        self.scales: dict[tuple[int, ...], float] = {}

    def scores(self, call: Call, document: object) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self.scales.setdefault(tuple(document.q.shape), call.options.scale)  # type: ignore[attr-defined]
        scores, slope = super().scores(call, document)  # type: ignore[arg-type]
        return scores * (kept / call.options.scale), slope


class OneStack(Loop):
    """Outputs of all calls lie on one stack, and the backward takes the last one."""

    def __init__(self) -> None:
        self.stack: list[torch.Tensor] = []

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(call, q, k, v)
        self.stack.append(out)
        return out, lse

    def backward(
        self,
        call: Call,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().backward(call, q, k, v, self.stack.pop(), lse, dout)


def test_one_stack_for_all_calls_shows_only_where_a_interfering_call_crosses() -> None:
    assert examine(CASE, double(OneStack()), "cpu", probes=()).symptoms == ()
    first = examine(CROSSED, double(OneStack()), "cpu", probes=()).first
    assert first is not None
    assert first.tensor == "dq"


def test_so_does_one_stack_for_all_sequences() -> None:
    backend = registry.load("fault:X39")
    for case in (Case(lengths=(3, 2), cuts=(2,)), Case(lengths=(3,), seed=3)):
        assert examine(case, backend, "cpu", probes=()).symptoms == ()
        assert examine(case.replace(seed=case.seed + 4), backend, "cpu", probes=()).symptoms


class FallsOverOthers(Loop):
    """Raises for all but the case's own scale."""

    def scores(self, call: Call, document: object) -> tuple[torch.Tensor, torch.Tensor]:
        if call.options.scale != CASE.softmax_scale:
            raise RuntimeError("another scale")
        return super().scores(call, document)  # type: ignore[arg-type]


def test_what_a_interfering_call_leaves_behind_is_met_by_the_case() -> None:
    case = Case(level="kernel", lengths=(3,), seed=1)
    first = examine(case, double(KeepsScale()), "cpu", probes=()).first
    assert first is not None
    assert first.tensor == "out"


@pytest.mark.parametrize("case", [CASE, CROSSED])
def test_a_interfering_call_that_fails_accuses_nobody(case: Case) -> None:
    assert examine(case, double(FallsOverOthers()), "cpu", probes=()).symptoms == ()


class FallsOverOthersBackward(Loop):
    """Raises in the backward of all but the case's own scale."""

    def dp(self, call: Call, document: Document, dout: torch.Tensor) -> torch.Tensor:
        if call.options.scale != CASE.softmax_scale:
            raise RuntimeError("another scale")
        return super().dp(call, document, dout)


@pytest.mark.parametrize("case", [CASE, CROSSED])
def test_nor_does_one_that_fails_later(case: Case) -> None:
    assert examine(case, double(FallsOverOthersBackward()), "cpu", probes=()).symptoms == ()
