"""Decoys: another case of the same shapes, as different as the backend takes, run around the case under test."""

from __future__ import annotations

import weakref

import pytest
import torch
from doubles import double, trial
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.decoy import decoy_of
from attn_fuzz.examine import examine
from attn_fuzz.strategies import Domain, cases
from attn_fuzz.trial import Trial
from backends import registry
from backends.kernel import Capabilities
from backends.loop import Call, Loop
from reference.answer import Inputs
from reference.case import LEVELS, Case

CPU = torch.device("cpu")
LOOP = registry.load("loop")
CASE = Case(level="kernel", lengths=(3, 5, 4), key_lengths=(3, 6, 9), seed=1)


def shapes(case: Case) -> list[tuple[int, ...]]:
    """What a cache could be keyed on: shapes of all tensors, and how many documents there are."""
    inputs = Trial(case, LOOP, CPU).inputs
    tensors = [inputs.q, inputs.k, inputs.v] if isinstance(inputs, Inputs) else [inputs.x, *inputs.weights.values()]
    return [tuple(x.shape) for x in tensors] + [(len(case.packed_lengths), case.capacity, *case.cuts)]


@settings(max_examples=60, deadline=None)
@given(case=st.one_of(*(cases(level, Domain.of(Capabilities(), "cpu")) for level in LEVELS)))
def test_a_decoy_has_the_shapes_of_its_case_and_other_values(case: Case) -> None:
    other = decoy_of(case, LOOP, "cpu")
    assert other is not None
    assert other.seed != case.seed
    assert (other.level, other.dtype, other.cuts, other.padding) == (case.level, case.dtype, case.cuts, case.padding)
    assert sum(other.lengths) == sum(case.lengths)
    assert sum(other.packed_key_lengths) == sum(case.packed_key_lengths)
    assert shapes(other) == shapes(case)


def test_a_decoy_differs_in_all_that_may_be_forgotten() -> None:
    other = decoy_of(CASE, LOOP, "cpu")
    assert other is not None
    assert (other.lengths, other.key_lengths) == ((5, 4, 3), (9, 3, 6))
    assert other.softmax_scale != CASE.softmax_scale
    assert other.window != CASE.window
    assert other.memory != CASE.memory
    layer = decoy_of(Case(lengths=(2, 3), rotary="default"), LOOP, "cpu")
    assert layer is not None
    assert layer.rotary_theta != Case().rotary_theta


@pytest.mark.parametrize(
    ("lacks", "kept"),
    [({"window": False}, "window"), ({"scale": False}, "scale"), ({"memories": ("contiguous",)}, "memory")],
)
def test_a_decoy_asks_for_nothing_that_is_not_taken(lacks: dict[str, object], kept: str) -> None:
    backend = double(Loop(), **lacks)
    other = decoy_of(CASE, backend, "cpu")
    assert other is not None
    assert backend.refusal(other, "cpu") is None
    assert getattr(other, kept) == getattr(CASE, kept)
    assert other.seed != CASE.seed


def test_there_may_be_no_decoy() -> None:
    assert decoy_of(CASE, double(Loop(), dtypes=("bf16",)), "cpu") is None


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


def test_a_decoy_runs_before_the_forward_and_again_before_the_backward() -> None:
    loop = Notes()
    probe = trial(loop, CASE)
    assert isinstance(probe.inputs, Inputs)
    own = probe.inputs.q[0, 0, 0].item()
    assert probe.observations
    who = [(step, "case" if value == own else "decoy") for step, value in loop.calls]
    assert who[:5] == [
        ("forward", "decoy"),
        ("forward", "case"),
        ("forward", "decoy"),
        ("backward", "decoy"),
        ("backward", "case"),
    ]
    # Under the second poison the case is alone.
    assert who[5:] == [("forward", "case"), ("backward", "case")]


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


def test_a_case_is_put_where_its_decoy_was() -> None:
    """What is kept by address is then the decoy's: its tensors are gone when those of the case are made."""
    loop = NotesMetadata()
    assert trial(loop, CASE).observations
    assert loop.alive[1] == 0


class KeepsScale(Loop):
    """The scale of the first call of a shape serves all others."""

    def __init__(self) -> None:
        self.scales: dict[tuple[int, ...], float] = {}

    def scores(self, call: Call, document: object) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self.scales.setdefault(tuple(document.q.shape), call.options.scale)  # type: ignore[attr-defined]
        scores, slope = super().scores(call, document)  # type: ignore[arg-type]
        return scores * (kept / call.options.scale), slope


class FallsOverOthers(Loop):
    """Raises for all but the case's own scale."""

    def scores(self, call: Call, document: object) -> tuple[torch.Tensor, torch.Tensor]:
        if call.options.scale != CASE.softmax_scale:
            raise RuntimeError("another scale")
        return super().scores(call, document)  # type: ignore[arg-type]


def test_what_a_decoy_leaves_behind_is_met_by_the_case() -> None:
    case = Case(level="kernel", lengths=(3,), seed=1)
    first = examine(case, double(KeepsScale()), "cpu", probes=()).first
    assert first is not None
    assert first.tensor == "out"


def test_a_decoy_that_fails_accuses_nobody() -> None:
    assert examine(CASE, double(FallsOverOthers()), "cpu", probes=()).symptoms == ()
