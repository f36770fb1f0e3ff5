"""Poison: what unwritten memory holds inside the context, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from attn_fuzz.execution import heap
from attn_fuzz.execution.child_memory import fill_in_children
from attn_fuzz.execution.poison import FINITE_BYTE, NAN_BYTE, POISONS, filler, poisoned

CPU = torch.device("cpu")
BYTES = {"nan": NAN_BYTE, "finite": FINITE_BYTE}
TRIES = 40


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


def has(x: torch.Tensor, byte: int) -> bool:
    return bool((x.contiguous().view(torch.uint8) == byte).all())


def all_filled(byte: int) -> bool:
    """Whether memory comes filled: more of it than can hold by chance what it held before."""
    held = [torch.empty(5000) for _ in range(300)]
    return all(has(x, byte) if byte != NAN_BYTE else bool(x.isnan().all()) for x in held)


# glibc hands out small blocks from its cache of freed ones, as they are: seldom, or every other one for a while.
needs_glibc = pytest.mark.skipif(
    not all(heap._library_fills(byte, heap._SMALL + heap._LARGE) for byte in BYTES.values())
    or "tcache_count=0" not in os.environ.get("GLIBC_TUNABLES", ""),
    reason="needs a C library that fills all that it hands out: run with -n, or set "
    "GLIBC_TUNABLES=glibc.malloc.tcache_count=0",
)


@needs_glibc
@every_dtype
@every_allocation
@pytest.mark.parametrize("poison", POISONS)
def test_fills_allocations_with_one_byte(poison: str, allocation: str, dtype: torch.dtype) -> None:
    with poisoned(poison, CPU):
        filled = [has(ALLOCATIONS[allocation](dtype), BYTES[poison]) for _ in range(TRIES)]
    assert all(filled)


@every_dtype
def test_the_byte_of_nan_is_nan(dtype: torch.dtype) -> None:
    assert torch.full((8,), NAN_BYTE, dtype=torch.uint8).view(dtype).isnan().all()


@needs_glibc
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 50_000, 2_000_000])
def test_fills_memory_that_was_in_use_before(poison: str, size: int) -> None:
    filled = []
    with poisoned(poison, CPU):
        for _ in range(TRIES if size < 2_000_000 else 3):
            used = torch.zeros(size)
            del used
            filled.append(has(torch.empty(size), BYTES[poison]))
    assert all(filled)


@needs_glibc
@pytest.mark.parametrize("poison", POISONS)
def test_what_kernels_allocate_is_filled_too(poison: str) -> None:
    used = torch.zeros(5000)
    del used
    with poisoned(poison, CPU):
        # Resized by an operator, in C++; given by one, in C++, and with autograd in sight.
        assert has(torch.zeros(0).resize_(5000), BYTES[poison])
        with torch.inference_mode():
            assert has(torch.empty(5000), BYTES[poison])
        assert has(torch.empty(5000, requires_grad=True).detach(), BYTES[poison])


@pytest.mark.parametrize("poison", POISONS)
def test_no_mode_and_no_function_of_ours_is_in_the_way(poison: str) -> None:
    functions = [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    before = flags()
    with poisoned(poison, CPU):
        assert flags() == before
        assert functions == [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
        assert "new_empty" not in vars(torch.Tensor)


@needs_glibc
def test_torch_allocates_as_before_afterwards() -> None:
    with poisoned("finite", CPU):
        pass
    assert not all_filled(FINITE_BYTE)


@needs_glibc
def test_the_outer_poison_is_back_after_an_inner_one() -> None:
    with poisoned("finite", CPU):
        with contextlib.suppress(KeyError), poisoned("nan", CPU):
            assert has(torch.empty(5000), NAN_BYTE)
            raise KeyError
        with poisoned("none", CPU):
            assert has(torch.empty(5000), FINITE_BYTE)
        assert has(torch.empty(5000), FINITE_BYTE)


@pytest.mark.parametrize("library", [True, False], ids=["by the library", "by the allocator"])
def test_threads_leave_no_poison_behind_in_any_order(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a kernel is asked several things at once in one process: the one that began last ends last."""
    if not library:
        monkeypatch.setattr(heap, "_library_fills", lambda byte, sizes: False)
        if not all(heap._allocator_fills(kind) for kind in heap._FILLS):
            pytest.skip("needs an allocator that can be told to fill")
    elif not heap.fills_all(NAN_BYTE):
        pytest.skip("needs a C library that fills")
    first, second = poisoned("nan", CPU), poisoned("nan", CPU)
    for context in (first, second):
        context.__enter__()
    first.__exit__(None, None, None)
    assert all_filled(NAN_BYTE)
    second.__exit__(None, None, None)
    assert not all_filled(NAN_BYTE)


# Where the C library cannot fill, or not the small blocks that it keeps in a cache.


def filled_by_library(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    """Has the heap believe that the C library fills blocks of these sizes only."""
    monkeypatch.setattr(heap, "_library_fills", lambda byte, asked: set(asked) <= set(sizes))


needs_flags = pytest.mark.skipif(
    not all(heap._allocator_fills(kind) for kind in heap._FILLS), reason="needs an allocator that can be told to fill"
)


@needs_flags
@every_allocation
@pytest.mark.parametrize("sizes", [(), heap._LARGE], ids=["nothing", "large blocks"])
def test_nan_then_comes_from_the_allocator(
    sizes: tuple[int, ...], allocation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled_by_library(monkeypatch, sizes)
    with poisoned("nan", CPU):
        for _ in range(TRIES):
            assert ALLOCATIONS[allocation](torch.float32).isnan().all()
            for half in (torch.bfloat16, torch.float16):
                assert ALLOCATIONS[allocation](half).isnan().any()
        assert torch.zeros(4).resize_(600).isnan().any()
    assert not any(heap._flag(kind) for kind in heap._FILLS if heap._flag(kind).value)  # type: ignore[union-attr]


@needs_flags
def test_the_other_poison_is_then_at_least_another(monkeypatch: pytest.MonkeyPatch) -> None:
    filled_by_library(monkeypatch, ())
    found = []
    for poison in POISONS:
        with poisoned(poison, CPU):
            found.append(torch.empty(50))
            # One inside another: never both at once, which torch refuses.
            with poisoned("nan", CPU):
                assert torch.empty(9).isnan().all()
            found.append(torch.empty(50))
    assert found[0].isnan().all()
    assert found[1].isnan().all()
    assert not found[2].any()
    assert not found[3].any()


@needs_glibc
def test_large_blocks_then_hold_the_finite_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    filled_by_library(monkeypatch, heap._LARGE)
    with poisoned("finite", CPU):
        assert has(torch.empty(5000), FINITE_BYTE)


@every_poison
def test_where_nothing_fills_memory_is_as_it_comes(poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_by_library(monkeypatch, ())
    monkeypatch.setattr(heap, "_allocator_fills", lambda kind: False)
    monkeypatch.setattr(heap, "_perturb", lambda byte: False)
    with poisoned(poison, CPU):
        assert torch.equal(torch.empty(3).fill_(2) + 1, torch.full((3,), 3.0))


def test_what_is_tried_out_is_out_of_sight() -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError(f"{func} was seen")

    for cached in (heap._library_fills, heap._allocator_fills):
        cached.cache_clear()
    for poison in POISONS:
        with Watching(), torch.device("meta"), poisoned(poison, CPU):
            pass


@pytest.mark.parametrize("tunables", ["", "glibc.malloc.check=0"])
def test_children_are_told_to_fill_small_blocks(tunables: str) -> None:
    environment = {"GLIBC_TUNABLES": tunables} if tunables else {}
    added = fill_in_children(environment)
    assert added["GLIBC_TUNABLES"] == ":".join(filter(None, (tunables, "glibc.malloc.tcache_count=0")))
    # What a user has chosen stays.
    assert fill_in_children({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}) == {}


@every_dtype
def test_finite_poison_is_finite_and_conspicuous(dtype: torch.dtype) -> None:
    x = torch.full((8,), FINITE_BYTE, dtype=torch.uint8).view(dtype)
    assert x.isfinite().all()
    assert (x > 200).all()


@pytest.mark.parametrize("poison", POISONS)
def test_values_that_were_asked_for_stay(poison: str) -> None:
    with poisoned(poison, CPU):
        assert not torch.zeros(4).any()
        assert torch.equal(torch.tensor([1.0, 2.0]).clone(), torch.tensor([1.0, 2.0]))
        assert torch.equal(torch.arange(3) + 1, torch.tensor([1, 2, 3]))


@needs_glibc
@pytest.mark.parametrize("poison", POISONS)
def test_reaches_into_autograd_functions(poison: str) -> None:
    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(dy)

    x = torch.zeros(3000, requires_grad=True)
    with poisoned(poison, CPU):
        (gradient,) = torch.autograd.grad(Unwritten.apply(x).sum(), x)
    assert has(gradient, BYTES[poison])


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


@needs_glibc
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("poison", POISONS)
def test_deterministic_algorithms_fill_nothing_themselves(poison: str) -> None:
    """Code under test may switch them on, and every poison would be NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with poisoned(poison, CPU):
        assert all(has(torch.empty(3000), BYTES[poison]) for _ in range(TRIES))


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
