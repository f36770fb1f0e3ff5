"""Batches asked what torch compiles for a few of their layouts, and uses for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compiled_kernels import BakesRows, ByLayout, Fused, GradientStops, Multiplies, Unseen
from devices import needs_cuda

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernels.backup import Backup
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch import compiled
from attn_fuzz.batch.batch_run import COMPILED
from attn_fuzz.batch.judge import SELDOM, judge, schedule_on
from attn_fuzz.batch.judged import Judged
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.compiled_call import Compiled, NotTraceable
from attn_fuzz.oracle.checks import compiled as single
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import NotCompiled
from attn_fuzz.reduction.call_sequence import CallSequence
from attn_fuzz.reference.case import Case

BATCH = CallBatch(Case(level="kernel", lengths=(3, 2, 5, 4, 1, 6, 7, 2, 9), heads=2, head_dim=8), (2, 3, 4, 7, 9))

WAYS = (0, 2)
"""Seeds: around calls, or in a module."""


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "_failed", {})


def of_kernel(kernel: Backup, **stated: Any) -> Backend:
    if stated:
        kernel.capabilities = dataclasses.replace(kernel.capabilities, **stated)  # type: ignore[misc]
    return Backend(kernel.name, kernel, levels=("kernel",))


def judged(backend: Backend, seed: int = 0, batch: CallBatch = BATCH, device: str = "cpu") -> Judged:
    return judge(batch.other(seed), backend, torch.device(device), SELDOM, asked=1)


def accused(found: Judged) -> set[int]:
    """Calls that are accused of what they give inside what is compiled."""
    assert not found.broken
    beyond = (found.z[:, found.names.index(COMPILED)] > LIMIT).nonzero()[:, 0].tolist()
    return {found.call_of(document) for document in beyond}


@pytest.mark.slow
@pytest.mark.parametrize("seed", WAYS)
@pytest.mark.parametrize("name", ["backup", "sdpa_dense"])
def test_a_right_kernel_is_clean_and_every_call_is_asked(name: str, seed: int) -> None:
    found = judged(registry.load(name), seed, CallBatch(BATCH.case.replace(causal=False), BATCH.ends))
    assert found.counted == {single.COMPILED: 5}
    assert not found.failing()
    assert found.asked == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", WAYS)
def test_what_is_kept_of_the_first_layouts_is_seen_in_others(seed: int) -> None:
    found = judged(of_kernel(BakesRows()), seed)
    # Those that have more rows than the one before them that is compiled for any.
    assert accused(found) == {3, 4}
    assert found.symptom(COMPILED) is NotCompiled


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_so_it_is_in_a_single_case(seed: int) -> None:
    case = BATCH.call(3).replace(seed=seed)
    verdict = examine(case, of_kernel(BakesRows()), "cpu", probes=(single.compiled_alike,))
    assert isinstance(verdict.first, NotCompiled)
    assert verdict.counted == {single.COMPILED: 1}


@pytest.mark.slow
def test_what_takes_other_calls_to_show_is_found_again() -> None:
    backend = of_kernel(BakesRows())
    sequence = CallSequence(BATCH.first(4), 3, SELDOM, 4)
    kept = CallSequence.from_dict(sequence.to_dict())
    assert kept.words(kept.judged(backend, torch.device("cpu"))) is not None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_a_compiled_backward_is_compared(seed: int) -> None:
    assert accused(judged(of_kernel(GradientStops()), seed)) == {0, 1, 2, 3, 4}


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "wrong"), [(Fused, True), (Multiplies, False)])
def test_bits_are_asked_of_what_multiplies_no_matrices(kernel: type[Fused], wrong: bool) -> None:
    singles = CallBatch(BATCH.case.replace(lengths=(1,) * 5), (2, 3, 5))
    found = judged(of_kernel(kernel(), traceable=None), batch=singles)  # type: ignore[arg-type]
    assert found.counted == {single.COMPILED: 3}
    assert accused(found) == ({0, 1, 2} if wrong else set())


@pytest.mark.slow
def test_calls_for_which_too_much_would_be_compiled_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "GRAPHS", {False: 1, True: 1})
    same = CallBatch(BATCH.case.replace(lengths=(3, 2, 4, 3, 2)), (2, 3, 5))
    found = judged(of_kernel(ByLayout()), 1, same)
    assert found.counted == {single.COMPILED: 2}
    assert not found.failing()
    assert not found.broken


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_what_runs_as_it_is_does_not_count(seed: int) -> None:
    assert judged(of_kernel(Unseen()), seed).counted == {f"{single.REFUSED} ({single.AS_IT_IS})": 5}


def test_what_torch_does_not_take_is_said_and_no_fault_without_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(compiled: Compiled, *rest: object, **how: object) -> bool:
        raise NotTraceable("no such operator")

    monkeypatch.setattr(Compiled, "run", refuses)
    found = judged(of_kernel(Backup()))
    assert not found.failing()
    assert found.counted == {"not taken by torch.compile (no such operator)": 5}
    for _ in range(3):
        found = judged(of_kernel(Backup(), traceable=True))
        assert accused(found) == {0}
    assert judged(of_kernel(Backup(), traceable=False)).counted == {}


def test_kernels_that_torch_compiles_anyway_are_left_alone() -> None:
    assert judged(registry.load("loop")).counted == {}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_it_comes_seldom(kind: str) -> None:
    schedule = schedule_on(kind)
    assert schedule.count(SELDOM) == 1
    assert len(schedule) > 200
    assert len(schedule) % 3


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("seed", [*WAYS, 4, 6])
def test_a_right_kernel_is_clean_on_a_gpu(seed: int) -> None:
    wide = CallBatch(BATCH.case.replace(head_dim=64, dtype="bf16"), BATCH.ends)
    found = judged(registry.load("backup"), seed, wide, "cuda")
    assert not found.failing()
    assert found.counted[single.COMPILED] >= 4
