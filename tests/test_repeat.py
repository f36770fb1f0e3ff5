"""Repetition and path: the same bits after other calls, from the implementation that was meant."""

from __future__ import annotations

import pytest
import torch
from doubles import double, trial

from attn_fuzz.backends import registry
from attn_fuzz.backends.loop import Call, Gradients, Loop
from attn_fuzz.batch.judge import moving
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.oracle.checks import Check
from attn_fuzz.oracle.checks.isolation import documents_apart
from attn_fuzz.oracle.checks.memory import unwritten_unread
from attn_fuzz.oracle.checks.repeat import path_taken, repeats_itself
from attn_fuzz.oracle.symptoms import NotRepeatable, WrongPath
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

CASE = Case(level="kernel", lengths=(3, 4), head_dim=4)
CPU = torch.device("cpu")


class RemembersShape(Loop):
    """Its plan is that of the call before, if that had another number of rows: a last bit of dQ moves."""

    def __init__(self, tensor: int = 0) -> None:
        self.tensor, self.rows = tensor, 0

    def backward(self, call: Call, q: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        gradients = list(super().backward(call, q, *rest))
        if self.rows not in (0, len(q)):
            gradients[self.tensor] = gradients[self.tensor] * (1 + 2.0**-22)
        self.rows = len(q)
        return gradients[0], gradients[1], gradients[2]


class Counts(Loop):
    """Notes the rows of every forward."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows.append(len(q))
        return super().forward(call, q, k, v)


@pytest.mark.parametrize(
    "case",
    [CASE, CASE.replace(lengths=(1,)), CASE.replace(dtype="bf16", capacity=2), Case(lengths=(3, 4), cuts=(2,))],
    ids=["two documents", "one token", "spare rows", "layer"],
)
def test_silent_on_a_right_backend(case: Case) -> None:
    assert list(repeats_itself(Trial(case, registry.load("loop"), CPU))) == []


@pytest.mark.parametrize(("index", "tensor"), [(0, "dq"), (1, "dk"), (2, "dv")])
def test_what_another_shape_leaves_behind_is_seen(index: int, tensor: str) -> None:
    (symptom,) = repeats_itself(trial(RemembersShape(index), CASE))
    assert (type(symptom), symptom.check, symptom.tensor) == (NotRepeatable, "repeatable", tensor)


@pytest.mark.parametrize("promise", [{"repeatable": False}, {"repeatable_backward": False}], ids=str)
def test_who_promises_nothing_is_not_accused(promise: dict[str, bool]) -> None:
    assert list(repeats_itself(trial(RemembersShape(), CASE, **promise))) == []


@pytest.mark.parametrize(
    ("case", "between"),
    [
        (CASE, 4),
        (CASE.replace(lengths=(3, 0)), 2),
        (CASE.replace(lengths=(0, 3, 0)), 2),
        (CASE.replace(lengths=(2,)), 1),
    ],
    ids=["a document less", "not an empty one", "nor two of them", "a shorter one"],
)
def test_the_call_in_between_has_other_rows(case: Case, between: int) -> None:
    loop = Counts()
    probe = trial(loop, case)
    assert probe.observations
    loop.rows.clear()
    assert list(repeats_itself(probe)) == []
    assert loop.rows == [between, case.tokens]


def test_a_single_row_has_no_smaller_call() -> None:
    loop = Counts()
    assert list(repeats_itself(trial(loop, CASE.replace(lengths=(1,))))) == []
    assert set(loop.rows) == {1}


class FallsOverFourRows(Loop):
    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(q) == 4:
            raise RuntimeError("four rows")
        return super().forward(call, q, k, v)


def test_the_call_in_between_is_judged_some_other_time() -> None:
    assert list(repeats_itself(trial(FallsOverFourRows(), CASE))) == []


# Promises that were not made.


class MovesInSmall(Loop):
    """As atomic sums do: every other run has other last bits, of calls shorter than those that were measured."""

    def __init__(self) -> None:
        self.runs = 0

    def backward(self, call: Call, q: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        dq, dk, dv = super().backward(call, q, *rest)
        self.runs += 1
        return (dq * (1 + 2.0**-22) if self.runs % 2 and len(q) < 100 else dq), dk, dv


UNSTATED = {"repeatable": None, "repeatable_backward": None}


@pytest.mark.parametrize("check", [repeats_itself, unwritten_unread, documents_apart], ids=lambda check: check.__name__)
def test_bits_that_nobody_has_promised_accuse_nobody(check: Check) -> None:
    """Four calls of another shape had shown the same bits: that is no promise."""
    probe = Trial(CASE, double(MovesInSmall(), **UNSTATED), CPU)
    assert probe.repeats("dq")
    assert probe.moves_by_itself("dq")
    assert list(check(probe)) == []


def test_bits_that_are_promised_do() -> None:
    seen = [s for check in (repeats_itself, unwritten_unread) for s in check(trial(MovesInSmall(), CASE))]
    assert "dq" in {symptom.tensor for symptom in seen}


def test_what_other_calls_leave_behind_is_seen_without_a_promise() -> None:
    (symptom,) = repeats_itself(Trial(CASE, double(RemembersShape(), **UNSTATED), CPU))
    assert type(symptom) is NotRepeatable


def test_batches_know_what_moves_by_itself() -> None:
    batch = CallBatch(Case(level="kernel", lengths=(3, 4, 5, 2), head_dim=4), (1, 3, 4))
    assert moving(batch, double(MovesInSmall(), **UNSTATED), CPU, "nan").tolist() == [True] * 4
    assert moving(batch, double(Loop(), **UNSTATED), CPU, "nan").tolist() == [False] * 4


# Paths.


def test_another_implementation_than_the_one_meant_is_seen() -> None:
    (symptom,) = path_taken(trial(Loop(), CASE, path="plan b"))
    assert (type(symptom), symptom.check) == (WrongPath, "path")
    assert "'plan b' ran, but should be loop" in symptom.message
    assert list(path_taken(trial(Loop(), CASE))) == []


def test_nothing_is_said_where_nothing_is_named() -> None:
    backend = double(Loop(), path="plan b")
    backend.kernel.paths_on = lambda device: frozenset()  # type: ignore[method-assign]
    assert list(path_taken(Trial(CASE, backend, CPU))) == []
