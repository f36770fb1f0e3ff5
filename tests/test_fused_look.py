"""Fused answers are used where their kernels are compiled and agree, and nothing waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from answered import answers_asked

from attn_fuzz.backends import registry
from attn_fuzz.batch import fused_look, verdicts
from attn_fuzz.batch.batch_run import BatchRun
from attn_fuzz.batch.fused_look import Look
from attn_fuzz.batch.verdicts import largest_z
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.reference.answer import Inputs, kernel_inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.fused_answer import Fused, Kind, unsupported_reason
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")
PLAIN = Profile()
CASE = Case(level="kernel", lengths=(3, 6, 0, 9), key_lengths=(3, 13, 2, 17), heads=2, head_dim=8, dtype="bf16")


class Compiler:
    """Stands for Triton's: how often it was asked, and what it waits for."""

    def __init__(self) -> None:
        self.asked: list[Kind] = []
        self.done = threading.Event()
        self.error: Exception | None = None
        self.used = 0
        self.off = 0.0
        self.counted = 1.0

    def compile_kind(self, kind: Kind, device: torch.device) -> None:
        self.asked.append(kind)
        assert self.done.wait(30.0)
        if self.error is not None:
            raise self.error

    def fused_answer(self, case: Case, inputs: Inputs, profile: Profile) -> dict[str, Fused]:
        self.used += 1
        found = {}
        for name, each in kernel_answer(case, inputs, profile).items():
            value = (each.value + self.off * each.variance.sqrt()).float()
            degrees = None if each.degrees is None else self.counted * each.degrees.float()
            found[name] = Fused(value, each.variance.rsqrt().float(), degrees)
        return found


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    found = Compiler()
    monkeypatch.setattr(fused_look, "_KINDS", {})
    monkeypatch.setattr(fused_look, "_DEVICES", ("cpu",))
    monkeypatch.setattr(fused_look, "unsupported_reason", lambda case, profile: None)
    monkeypatch.setattr(fused_look, "compile_kind", found.compile_kind)
    monkeypatch.setattr(fused_look, "fused_answer", found.fused_answer)
    yield found
    found.done.set()
    fused_look.settle()


def look(case: Case = CASE) -> Look | None:
    return fused_look.look(case, kernel_inputs(case, CPU), PLAIN)


def test_what_is_met_once_is_not_compiled(compiler: Compiler) -> None:
    assert look() is None
    assert fused_look.state(CASE, CPU) == "not compiled"
    assert compiler.asked == []


def test_nothing_waits_and_one_kind_is_compiled_at_a_time(compiler: Compiler) -> None:
    other = CASE.replace(head_dim=16)
    assert [look(case) for case in (CASE, CASE, other, other, CASE)] == [None] * 5
    assert compiler.asked == [Kind.of(CASE)]
    compiler.done.set()
    fused_look.settle()
    assert look() is not None
    assert look(other) is None
    fused_look.settle()
    assert compiler.asked == [Kind.of(CASE), Kind.of(other)]
    assert look(other) is not None


@pytest.mark.parametrize(("off", "used"), [(0.0, True), (0.4, True), (0.7, False), (float("nan"), False)])
def test_a_kind_is_used_where_it_agrees(compiler: Compiler, off: float, used: bool) -> None:
    compiler.done.set()
    compiler.off = off
    for _ in range(2):
        look()
        fused_look.settle()
    assert [look() is not None for _ in range(2)] == [used] * 2
    # One that has not agreed is not asked again.
    assert compiler.used == (2 if used else 1)
    state = fused_look.state(CASE, CPU)
    assert state == "in use" if used else state.endswith("standard deviations")


@pytest.mark.parametrize(("counted", "used"), [(1.2, True), (0.95, True), (0.8, False)])
def test_fewer_errors_than_there_are_make_no_bound(compiler: Compiler, counted: float, used: bool) -> None:
    compiler.done.set()
    compiler.counted = counted
    for _ in range(2):
        look()
        fused_look.settle()
    assert (look() is not None) is used


def test_what_is_off_is_a_doubt() -> None:
    """A value beyond the limit is beyond what is taken for sure, however the answer is off, and its budget."""
    assert Look({}, {}).sure("dq", 10.0) == pytest.approx(10.0 / 1.1)
    assert Look({}, {"lse": 2.0}).sure("lse", 10.0) == pytest.approx(7.0 / 1.1)


def test_an_answer_that_would_fill_the_device_is_left_to_chunks(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.done.set()
    monkeypatch.setattr(fused_look, "chunk_bytes", lambda device: 1000)
    for _ in range(4):
        assert look() is None
        fused_look.settle()
    assert compiler.asked == []


def test_a_compiler_that_fails_is_asked_once(compiler: Compiler) -> None:
    compiler.done.set()
    compiler.error = RuntimeError("no such instruction")
    for _ in range(4):
        assert look() is None
        fused_look.settle()
    assert fused_look.state(CASE, CPU) == "RuntimeError: no such instruction"
    assert len(compiler.asked) == 1
    assert compiler.used == 0


@pytest.mark.parametrize("wrong", [0.0, 50.0])
def test_verdicts_by_a_fused_answer(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """The float64 answer is asked for those alone that it leaves a doubt about; rows are judged, too."""
    compiler.done.set()
    for _ in range(2):
        look()
        fused_look.settle()
    ran = BatchRun(CallBatch.of_one(CASE), registry.load("loop"), CPU, "nan", 1, lambda: None)
    ran.first["out"][3] += wrong
    monkeypatch.setattr(verdicts, "rows_of", _rows_of)
    asked = answers_asked(monkeypatch)
    z = largest_z(CASE, ran.drawn, PLAIN, [ran.first], first_look=True)
    assert asked == ([(torch.float64, [1])] if wrong else [])
    exact = largest_z(CASE, ran.drawn, PLAIN, [ran.first], first_look=False)
    assert torch.equal(exact > 10.0, z > 10.0)
    assert torch.allclose(z, exact, atol=0.1)


def _rows_of(got: torch.Tensor, found: Fused) -> tuple[torch.Tensor, torch.Tensor]:
    """``fused_answer.rows_of`` without a compiler."""
    z = torch.where(got == found.value, 0.0, (got.float() - found.value).abs() * found.inverse)
    z = z.nan_to_num(torch.inf, posinf=torch.inf).view(*got.shape[:2], -1)
    return z.amax(2), z.square().mean(2)


def test_what_has_terms_of_its_own_is_left_to_the_exact_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_fuzz.reference.fused_answer.importlib.util.find_spec", lambda name: name)
    assert unsupported_reason(CASE, PLAIN) is None
    assert unsupported_reason(CASE, Profile(exp_error=2.0**-19)) is None
    for case in (
        CASE.replace(dtype="fp32"),
        CASE.replace(values="tiny"),
        CASE.replace(head_dim=256),
        CASE.replace(head_dim_v=16),
        CASE.replace(lse_gradient=True),
    ):
        assert unsupported_reason(case, PLAIN)
    for facts in (
        {"rounds_scores": True},
        {"products": "fp16"},
        {"scores_dtype": "fp16"},
        {"probabilities_dtype": "fp16"},
        {"rounds_probabilities": False},
        {"atomic_sums": frozenset({"dk"})},
        {"exp_error": 2.0**-8},
    ):
        assert unsupported_reason(CASE, Profile(**facts))  # type: ignore[arg-type]


def test_on_a_cpu_nothing_is_compiled() -> None:
    before = dict(fused_look._KINDS)
    for _ in range(3):
        assert look() is None
    assert before == fused_look._KINDS
