"""Kernels that fill what torch allocates on a GPU: what they fill, and that nothing else is any different."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from devices import DEVICES, needs_cuda
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attn_fuzz.execution import allocations
from attn_fuzz.execution.allocations import can_be_filled, filled_allocations
from attn_fuzz.execution.poison import FINITE_BYTE, NAN_BYTE, POISONS, poisoned

# They work on CPUs (DEVICES) as they do on GPUs, where alone they are needed.
ALLOCATIONS: dict[str, Callable[[torch.device, torch.dtype], torch.Tensor]] = {
    "empty": lambda device, dtype: torch.empty(3, 5, dtype=dtype, device=device),
    "empty_like": lambda device, dtype: torch.empty_like(torch.zeros(3, 5, dtype=dtype, device=device)),
    "new_empty": lambda device, dtype: torch.zeros(1, dtype=dtype, device=device).new_empty(3, 5),
    "empty_strided": lambda device, dtype: torch.empty_strided((3, 5), (8, 1), dtype=dtype, device=device),
    "new_empty_strided": lambda device, dtype: torch.zeros(1, device=device, dtype=dtype).new_empty_strided(
        (3, 5), (1, 3)
    ),
    "empty_permuted": lambda device, dtype: torch.empty_permuted((3, 5), (1, 0), dtype=dtype, device=device),
    "channels_last": lambda device, dtype: torch.empty(
        1, 2, 3, 4, dtype=dtype, device=device, memory_format=torch.channels_last
    ),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def filled(device: torch.device) -> Iterator[torch.device]:
    """Inside the finite poison, on that device."""
    with filled_allocations(FINITE_BYTE, device):
        yield device


def has(x: torch.Tensor, byte: int) -> bool:
    return bool((x.cpu().contiguous().view(torch.uint8) == byte).all())


@pytest.mark.slow
def test_can_stand_before_torchs_own(device: torch.device) -> None:
    assert can_be_filled(device)


@pytest.mark.parametrize("byte", [FINITE_BYTE, NAN_BYTE])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_fills_allocations(allocation: str, dtype: torch.dtype, byte: int, device: torch.device) -> None:
    with filled_allocations(byte, device):
        assert has(ALLOCATIONS[allocation](device, dtype), byte)


@pytest.mark.parametrize(("byte", "value"), [(NAN_BYTE, True), (FINITE_BYTE, False)])
def test_booleans_differ_and_are_booleans(byte: int, value: bool, device: torch.device) -> None:
    with filled_allocations(byte, device):
        assert has(torch.empty(9, dtype=torch.bool, device=device).view(torch.uint8), value)


def test_values_that_were_asked_for_stay(filled: torch.device) -> None:
    assert not torch.zeros(4, device=filled).any()
    assert torch.arange(3, device=filled).tolist() == [0, 1, 2]
    assert torch.ones(3, device=filled).clone().half().tolist() == [1.0] * 3
    out = torch.full((3,), 7.0, device=filled)
    assert torch.empty(3, out=out, device=filled) is out
    assert out.tolist() == [7.0] * 3
    assert torch.empty(0, device=filled).numel() == 0
    assert torch.empty(3, 0, device=filled).shape == (3, 0)


def test_other_kinds_of_tensors_are_left_alone(filled: torch.device) -> None:
    assert torch.empty(3, device="meta").is_meta
    assert torch.empty(2, 2, layout=torch.sparse_coo, device=filled)._nnz() == 0
    eye = torch.eye(3, device=filled)
    assert torch.equal(eye.to_sparse() @ eye, eye)
    parts = [torch.ones(2, 3, device=filled), torch.zeros(1, 3, device=filled)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert [len(x) for x in nested.unbind()] == [2, 1]
    with torch._subclasses.FakeTensorMode():
        assert torch.empty_like(torch.empty(3, device=filled)).device.type == filled.type


def test_modes_see_what_they_would_see(filled: torch.device) -> None:
    class Dispatch(TorchDispatchMode):
        seen: list[object] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        seen: list[object] = []  # noqa: RUF012

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Function() as functions, Dispatch() as operations:
        x = torch.empty(3, device=filled)
    assert functions.seen == [torch.empty]
    assert operations.seen == [torch.ops.aten.empty.memory_format]
    assert has(x, FINITE_BYTE)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilers_do_not_notice(backend: str, filled: torch.device) -> None:
    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(x), torch.empty(x.shape, device=x.device).copy_(x)

    unwritten, copied = compiled(torch.ones(4, device=filled))
    assert has(unwritten, FINITE_BYTE)
    assert copied.tolist() == [1.0] * 4


def test_transforms_do_not_notice(filled: torch.device) -> None:
    x = torch.arange(6.0, device=filled).view(2, 3)
    assert has(torch.vmap(lambda row: torch.empty_like(row))(x), 0x5A)
    assert torch.equal(torch.func.grad(lambda y: (torch.empty_like(y).fill_(2) * y).sum())(x), torch.full_like(x, 2))


def test_a_backward_in_a_thread_of_its_own_is_reached(filled: torch.device) -> None:
    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(dy)

    x = torch.zeros(3, device=filled, requires_grad=True)
    assert has(torch.autograd.grad(Unwritten.apply(x).sum(), x)[0], FINITE_BYTE)
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(has(torch.empty(7, device=filled), FINITE_BYTE)))
    thread.start()
    thread.join()
    assert found == [True]


def test_torch_allocates_as_before_afterwards(device: torch.device) -> None:
    with filled_allocations(FINITE_BYTE, device):
        with contextlib.suppress(KeyError), filled_allocations(NAN_BYTE, device):
            assert has(torch.empty(3, device=device), NAN_BYTE)
            raise KeyError
        assert has(torch.empty(3, device=device), FINITE_BYTE)
    kernels = [torch.library.get_kernel(f"aten::{name}", device.type.upper()) for name in allocations._ALLOCATIONS]
    assert "attn_fuzz" not in str(kernels)
    ones = torch.ones(3000, device=device)
    del ones
    assert not has(torch.empty(3000, device=device), FINITE_BYTE)


@pytest.mark.parametrize("always", [False, True])
def test_nobody_is_warned(always: bool, device: torch.device) -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(always)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            filters = list(warnings.filters)
            with filled_allocations(FINITE_BYTE, device):
                assert warnings.filters == filters
                torch.empty(3, device=device)
    finally:
        torch.set_warn_always(before)


@pytest.mark.parametrize("lacking", ["get_kernel", "Library"])
def test_where_torch_cannot_do_it_nothing_is_done(
    lacking: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocations.can_be_filled.cache_clear()
    allocations._own_kernels.cache_clear()
    monkeypatch.delattr(torch.library, lacking)
    with filled_allocations(FINITE_BYTE, device):
        assert torch.ones(3, device=device).sum() == 3
    allocations.can_be_filled.cache_clear()


def test_where_user_code_would_notice_nothing_is_done(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> None:
        raise RuntimeError("already associated to a python object")

    allocations.can_be_filled.cache_clear()
    with monkeypatch.context() as broken:
        broken.setattr(torch.Tensor, "_make_subclass", raises)
        assert not can_be_filled(device)
    allocations.can_be_filled.cache_clear()
    assert can_be_filled(device)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_fills_device_memory(poison: str, compiled: bool) -> None:
    device = torch.device("cuda")
    with poisoned(poison, device, free_blocks=compiled):
        x = torch.empty(7, device=device)
        host = torch.empty(7, pin_memory=True).zero_()
    assert has(x, NAN_BYTE if poison == "nan" else FINITE_BYTE)
    assert not host.any()


@pytest.mark.cuda
@needs_cuda
def test_fills_on_the_stream_that_allocates_and_in_graphs() -> None:
    device = torch.device("cuda")
    with filled_allocations(FINITE_BYTE, device):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.empty(1 << 20, device=device)
        side.synchronize()
        assert has(x, FINITE_BYTE)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.empty(1 << 10, device=device)
        graph.replay()
        torch.cuda.synchronize()
        assert has(y, FINITE_BYTE)
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.empty(9, device=device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
