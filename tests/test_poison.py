"""Poison: what unwritten memory holds inside the context, and that nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from attn_fuzz.poison import FINITE_BYTE, POISONS, _heap_fills, filler, poisoned

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Allocate = Callable[[torch.dtype], torch.Tensor]
ALLOCATIONS: dict[str, Allocate] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 5, dtype=dtype)),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(3, 5),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (8, 1), dtype=dtype),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((3, 5), (1, 3)),
}
every_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_poison = pytest.mark.parametrize("poison", [*POISONS, "none"])

Flags = tuple[bool, bool, bool, object]


def flags() -> Flags:
    """Everything global that a poison may touch."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        _get_current_dispatch_mode(),
    )


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts torch's flags back after a test that sets them."""
    deterministic, warn_only, fill, _ = flags()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@every_dtype
@every_allocation
def test_nan_fills_allocations(allocation: str, dtype: torch.dtype) -> None:
    with poisoned("nan", CPU):
        x = ALLOCATIONS[allocation](dtype)
    assert x.isnan().all()


@every_dtype
@every_allocation
def test_finite_fills_allocations_with_one_byte(allocation: str, dtype: torch.dtype) -> None:
    with poisoned("finite", CPU):
        x = ALLOCATIONS[allocation](dtype)
    assert (x.contiguous().view(torch.uint8) == FINITE_BYTE).all()


@every_dtype
@every_allocation
def test_finite_fills_allocations_where_the_heap_does_not(
    allocation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_fuzz.poison._heap_fills", lambda: False)
    with poisoned("finite", CPU):
        assert _get_current_dispatch_mode() is not None
        x = ALLOCATIONS[allocation](dtype)
    assert (x.contiguous().view(torch.uint8) == FINITE_BYTE).all()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 50_000, 2_000_000])
def test_fills_memory_that_was_in_use_before(poison: str, size: int) -> None:
    with poisoned(poison, CPU):
        for _ in range(3):
            used = torch.zeros(size)
            del used
            x = torch.empty(size)
            assert x.isnan().all() if poison == "nan" else (x.view(torch.uint8) == FINITE_BYTE).all()


@pytest.mark.skipif(not _heap_fills(), reason="needs a C library that fills what it hands out")
def test_what_kernels_allocate_is_filled_too() -> None:
    used = torch.zeros(5000)
    del used
    with poisoned("finite", CPU):
        # Resized by an operator, in C++.
        x = torch.zeros(0).resize_(5000)
    assert (x.view(torch.uint8) == FINITE_BYTE).all()


def test_torch_allocates_as_before_afterwards() -> None:
    functions = [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    with poisoned("finite", CPU):
        pass
    assert functions == [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    assert "new_empty" not in vars(torch.Tensor)
    blocks = [torch.zeros(4096, dtype=torch.uint8) for _ in range(3)]
    del blocks
    assert not (torch.empty(4096, dtype=torch.uint8) == FINITE_BYTE).all()


@every_dtype
def test_finite_poison_is_finite_and_conspicuous(dtype: torch.dtype) -> None:
    with poisoned("finite", CPU):
        x = torch.empty(4, dtype=dtype)
    assert x.isfinite().all()
    assert (x > 200).all()


@pytest.mark.parametrize("poison", POISONS)
def test_values_that_were_asked_for_stay(poison: str) -> None:
    with poisoned(poison, CPU):
        assert not torch.zeros(4).any()
        assert torch.equal(torch.tensor([1.0, 2.0]).clone(), torch.tensor([1.0, 2.0]))
        assert torch.equal(torch.arange(3) + 1, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("poison", POISONS)
def test_reaches_into_autograd_functions(poison: str) -> None:
    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(dy)

    x = torch.zeros(3, requires_grad=True)
    with poisoned(poison, CPU):
        (gradient,) = torch.autograd.grad(Unwritten.apply(x).sum(), x)
    poison_in_memory = gradient.isnan() if poison == "nan" else gradient.view(torch.uint8) == FINITE_BYTE
    assert poison_in_memory.all()


@every_poison
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.usefixtures("restored")
def test_flags_are_restored(poison: str, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]
    before = flags()
    with poisoned(poison, CPU):
        pass
    assert flags() == before


@every_poison
def test_flags_are_restored_after_an_exception(poison: str) -> None:
    before = flags()
    with pytest.raises(KeyError, match="inside"), poisoned(poison, CPU):
        raise KeyError("inside")
    assert flags() == before


def test_none_leaves_the_flags_alone() -> None:
    before = flags()
    with poisoned("none", CPU):
        assert flags() == before


def test_unknown_poison_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'arsenic'.*nan.*finite"):
        poisoned("arsenic", CPU)


def test_fillers_differ_as_their_poisons_do() -> None:
    assert torch.tensor(filler("nan")).isnan()
    assert torch.tensor(filler("finite")).isfinite()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("poison", POISONS)
def test_fills_device_memory(poison: str) -> None:
    device = torch.device("cuda")
    with poisoned(poison, device):
        x = torch.empty(7, device=device)
    poison_in_memory = x.isnan() if poison == "nan" else x.view(torch.uint8) == FINITE_BYTE
    assert bool(poison_in_memory.all())
