"""Poisoned memory, and all else that the harness puts around user code, changes nothing of what that code may do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import on_every_device
from doubles import double

from attn_fuzz.backends import registry
from attn_fuzz.backends.loop import Loop
from attn_fuzz.batch.batch_size import _forms_a_mask
from attn_fuzz.batch.judge import SCHEDULE, judge
from attn_fuzz.batch.judged import Question
from attn_fuzz.batch.packed import judge_packed
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.execution.runner import KernelCall, run_kernel, run_layer
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import PoisonLeaked
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import layer_inputs
from attn_fuzz.reference.memory import same_bits

USER_CODE = Path(__file__).with_name("user_code.py")

# Each poison by itself too: what one of them hides, the other must not be needed to show.
under_every_poison = pytest.mark.parametrize(
    ("dtype", "poisons"),
    [
        pytest.param("fp32", POISONS, id="fp32"),
        *(pytest.param("bf16", (poison,), marks=pytest.mark.slow, id=f"bf16-{poison}") for poison in POISONS),
    ],
)

KERNEL_CASES = {
    "fp32": Case(level="kernel", lengths=(5, 3), head_dim=4),
    "bf16": Case(level="kernel", lengths=(1, 7), key_lengths=(4, 7), heads=4, kv_heads=2, head_dim=8, dtype="bf16"),
}
LAYER_CASES = {
    "fp32": Case(level="layer", lengths=(4, 5), cuts=(3, 6), head_dim=4, hidden=8),
    "bf16": Case(level="layer", lengths=(3,), heads=4, kv_heads=2, head_dim=8, hidden=16, dtype="bf16"),
}
in_every_dtype = pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])


@on_every_device
@under_every_poison
def test_a_kernel_that_does_everything_is_clean(dtype: str, poisons: tuple[str, ...], device: str) -> None:
    assert examine(KERNEL_CASES[dtype], registry.load(f"{USER_CODE}:kernel"), device, poisons).symptoms == ()


@on_every_device
@under_every_poison
def test_a_layer_that_does_everything_is_clean(dtype: str, poisons: tuple[str, ...], device: str) -> None:
    # A second case of the same shapes: the layer's module persists, and the first one's results were its gradients.
    backend = registry.load(f"layer:{USER_CODE}:Layer")
    for seed in (0, 1):
        assert examine(LAYER_CASES[dtype].replace(seed=seed), backend, device, poisons).symptoms == ()


@on_every_device
@in_every_dtype
def test_a_row_that_nobody_writes_is_convicted_all_the_same(dtype: str, device: str) -> None:
    verdict = examine(KERNEL_CASES[dtype], registry.load(f"{USER_CODE}:forgets_a_row"), device)
    assert type(verdict.first) is PoisonLeaked
    assert verdict.first.tensor == "out"


@on_every_device
@pytest.mark.parametrize("level", ["kernel", "layer"])
def test_nothing_is_left_behind(level: str, device: str, capfd: pytest.CaptureFixture[str]) -> None:
    empties = [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    case, name = (KERNEL_CASES["fp32"], "kernel") if level == "kernel" else (LAYER_CASES["fp32"], "Layer")
    backend = registry.load(f"{'layer:' if level == 'layer' else ''}{USER_CODE}:{name}")
    examine(case, backend, device, probes=())
    assert empties == [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    with torch.device("meta"):
        assert torch.empty(1).is_meta
    assert not torch.are_deterministic_algorithms_enabled()
    assert "a kernel that prints" in capfd.readouterr().out


class StaticGradients(Loop):
    """A loop whose gradients lie where those of the call before lay."""

    def __init__(self) -> None:
        self.memory: dict[tuple[object, ...], torch.Tensor] = {}

    def allocate(self, like: torch.Tensor, name: str) -> torch.Tensor:
        if name not in ("dq", "dk", "dv"):
            return super().allocate(like, name)
        shape = like.shape[1:]
        made = self.memory.setdefault((name, shape, like.dtype), torch.zeros(999, *shape, dtype=like.dtype))
        return made[: len(like)]


def _stays(first: Observation, run_again: Callable[[], Observation]) -> None:
    before = {name: x.clone() for name, x in first.results.items()}
    second = run_again()
    for name, x in before.items():
        assert same_bits(first.results[name], x), name
        assert name == "lse" or not same_bits(second.results[name], x), name


@on_every_device
def test_what_a_persistent_module_has_given_stays(device: str) -> None:
    case, where = LAYER_CASES["fp32"], torch.device(device)
    backend = registry.load(f"layer:{USER_CODE}:Layer")

    def once(seed: int) -> Observation:
        return run_layer(backend, case, layer_inputs(case.replace(seed=seed), "cpu"), "nan", where)

    # The module that the second run gets is the one whose gradients were the first one's results.
    once(2)
    _stays(once(0), lambda: once(1))


def test_what_a_backward_with_static_memory_has_given_stays() -> None:
    case, backend = KERNEL_CASES["fp32"], double(StaticGradients())

    def once(seed: int) -> Observation:
        return run_kernel(backend, case, kernel_inputs(case.replace(seed=seed), "cpu"), "nan", torch.device("cpu"))

    _stays(once(0), lambda: once(1))
    assert examine(case, backend, "cpu").symptoms == ()


def test_a_backward_with_static_memory_is_clean_in_batches() -> None:
    case = Case(level="kernel", lengths=(3, 6, 1, 9, 2, 5, 4, 8), heads=2, head_dim=8)
    for turn in dict.fromkeys(SCHEDULE):
        judged = judge(
            CallBatch(case, (1, 3, 4, 8)), double(StaticGradients(), covers_all_rows=False), torch.device("cpu"), turn
        )
        assert judged.failing() == []
        assert not judged.broken


def test_two_runs_of_a_packed_call_are_compared_and_not_one_with_itself() -> None:
    class Drifting(StaticGradients):
        """Gives other gradients every time, in the same memory."""

        calls = 0

        def backward(self, *args: object) -> tuple[torch.Tensor, ...]:
            gradients = super().backward(*args)  # type: ignore[arg-type]
            type(self).calls += 1
            gradients[0].add_(1e-7 * self.calls)
            return gradients

    case = Case(level="kernel", lengths=(3, 6, 1, 9), heads=2, head_dim=8)
    backend = double(Drifting(), repeatable=True)
    judged = judge_packed(case, backend, torch.device("cpu"), Question("nan", "again"))
    assert judged.z[:, judged.names.index("bits")].isinf().any()


def test_a_kernel_that_cannot_be_watched_for_masks_is_not_accused() -> None:
    # Under a dispatch mode ``Subclass(2, 3)`` raises: the mode's tensor comes out of Python.
    backend = registry.load(f"{USER_CODE}:kernel")
    case = Case(level="kernel", lengths=(3, 6, 1, 9), heads=2, head_dim=8)
    call = KernelCall(backend, case, kernel_inputs(case, "cpu"), "nan", torch.device("cpu"))
    assert not _forms_a_mask(call)
    assert examine(KERNEL_CASES["fp32"], backend, "cpu", probes=()).symptoms == ()
