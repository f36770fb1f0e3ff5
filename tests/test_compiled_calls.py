"""Calls inside what torch compiles, alone and in a module; asked of few cases, since each takes seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compiled_kernels import BakesRows, ByStrides, Fused, GradientStops, Multiplies, Unseen
from devices import needs_cuda

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernels.backup import Backup
from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.compiled_call import Compiled, NotTraceable
from attn_fuzz.oracle.checks import RARE, compiled
from attn_fuzz.oracle.examine import some_probes
from attn_fuzz.oracle.symptoms import NotCompiled, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

CASE = Case(level="kernel", lengths=(3, 2), head_dim=8)


def asked(kernel: Backup, case: Case = CASE, device: str = "cpu", **stated: Any) -> tuple[list[Symptom], Trial]:
    if stated:
        kernel.capabilities = dataclasses.replace(kernel.capabilities, **stated)  # type: ignore[misc]
    trial = Trial(case, Backend(kernel.name, kernel, levels=("kernel",)), torch.device(device), interfered=False)
    return list(compiled.compiled_alike(trial)), trial


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "accused"), [(Fused, True), (Multiplies, False)])
def test_bits_are_asked_of_what_multiplies_no_matrices(kernel: type[Fused], accused: bool) -> None:
    single = CASE.replace(lengths=(1, 1))
    assert bool(asked(kernel(), single, traceable=None)[0]) is accused


@pytest.mark.slow
def test_a_module_that_lays_its_inputs_out_otherwise_is_no_fault() -> None:
    assert asked(ByStrides(), CASE.replace(memory="strided", seed=2))[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_what_only_compiled_calls_do_is_seen(seed: int) -> None:
    right, trial = asked(Backup(), CASE.replace(seed=seed))
    assert right == []
    assert trial.counted == {compiled.COMPILED: 1}
    found, _ = asked(GradientStops(), CASE.replace(seed=seed))
    assert [(type(symptom), symptom.tensor) for symptom in found] == [(NotCompiled, "dk")]
    where = "in a module " if seed >= 2 else ""
    assert found[0].message.startswith(f"{where}compiled by torch (aot_eager): document ")


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASE, CASE.replace(lengths=(3,))])
def test_what_is_compiled_for_another_layout_is_used_for_this_one(case: Case) -> None:
    assert {symptom.tensor for symptom in asked(BakesRows(), case)[0]} >= {"out", "dq"}


def test_what_runs_as_it_is_does_not_count_as_compiled() -> None:
    found, trial = asked(Unseen())
    assert found == []
    assert trial.counted == {"not taken by torch.compile (it runs as it is)": 1}


def test_what_torch_does_not_take_is_said_and_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_failed", {})

    def refuses(compiled: Compiled, *rest: object) -> bool:
        raise NotTraceable("no such operator")

    monkeypatch.setattr(Compiled, "run", refuses)
    found, trial = asked(Backup())
    assert found == []
    assert trial.counted == {"not taken by torch.compile (no such operator)": 1}
    (symptom,), _ = asked(Backup(), traceable=True)
    assert symptom.tensor == "call"
    assert asked(Backup(), traceable=False)[1].counted == {}


@pytest.mark.slow
def test_what_its_compiler_raised_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_failed", {})

    def raises(graph: object, examples: object) -> None:
        raise TypeError("no such number\nin the second line")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: raises)
    _, trial = asked(Backup())
    assert trial.counted == {"not taken by torch.compile (TypeError: no such number)": 1}


def test_one_case_in_a_thousand_is_asked() -> None:
    often = sum(bool(set(RARE) & set(some_probes(CASE.replace(seed=seed)))) for seed in range(6_000))
    assert 0 < often < 20


@pytest.mark.parametrize(
    ("stated", "may"),
    [
        ({}, True),
        ({"compiles": True}, False),
        # Its layouts are few, and compiled for once.
        ({"compiles": True, "layouts": 4}, True),
        ({"traceable": False, "layouts": 4}, False),
    ],
)
def test_what_compiles_for_shapes_may_be_called_from_compiled_code(stated: dict[str, Any], may: bool) -> None:
    kernel = Backup()
    kernel.capabilities = dataclasses.replace(kernel.capabilities, **stated)  # type: ignore[misc]
    assert compiled.compilable(Backend("stated", kernel), torch.device("cpu")) is may


def test_kernels_that_torch_compiles_anyway_are_left_alone() -> None:
    for name in ("loop", "flex_compiled"):
        trial = Trial(CASE, registry.load(name), torch.device("cpu"))
        assert not list(compiled.compiled_alike(trial))
        assert trial.counted == {}


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(8))
def test_a_right_kernel_is_clean_on_a_gpu(seed: int) -> None:
    found, trial = asked(Backup(), CASE.replace(seed=seed, head_dim=64, dtype="bf16"), "cuda")
    assert found == []
    assert trial.counted == {compiled.COMPILED: 1}
