"""The K/V buffer: how it lies in memory, what may be written when, what reads share, what gradients add up to."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.backends.kv_buffer import KeyValueBuffer, key_value_views
from attn_fuzz.reference.case import MEMORIES
from attn_fuzz.reference.memory import same_bits

CPU = torch.device("cpu")
ROWS, KV_HEADS, HEAD_DIM = 9, 2, 4
every_memory = pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory != "broadcast"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def views(memory: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return key_value_views(ROWS, KV_HEADS, HEAD_DIM, dtype, CPU, memory)


def buffer_of(memory: str = "contiguous", dtype: torch.dtype = torch.float32) -> KeyValueBuffer:
    return KeyValueBuffer(ROWS, KV_HEADS, HEAD_DIM, dtype, CPU, memory)


def rows(count: int, start: float = 0.0) -> torch.Tensor:
    return torch.arange(count * KV_HEADS * HEAD_DIM, dtype=torch.float32).view(count, KV_HEADS, HEAD_DIM) + start


@every_memory
@every_dtype
def test_views_have_the_shape_and_dtype(memory: str, dtype: torch.dtype) -> None:
    for view in views(memory, dtype):
        assert view.shape == (ROWS, KV_HEADS, HEAD_DIM)
        assert view.dtype == dtype


@every_memory
def test_no_element_is_shared(memory: str) -> None:
    k, v = views(memory)
    for index, view in enumerate((k, v)):
        view.copy_(rows(ROWS, 1000.0 * index))
    assert torch.equal(k, rows(ROWS))
    assert torch.equal(v, rows(ROWS, 1000.0))


@every_memory
def test_channels_are_adjacent(memory: str) -> None:
    """What every fused kernel asks for, but for the layout that is there to deny it."""
    assert {view.stride(-1) for view in views(memory)} == {2 if memory == "strided" else 1}


def test_contiguous_is_contiguous_and_apart() -> None:
    k, v = views("contiguous")
    assert k.is_contiguous()
    assert v.is_contiguous()
    assert k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()


def test_fused_interleaves_k_and_v_in_one_row() -> None:
    k, v = views("fused")
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.stride() == v.stride() == (2 * KV_HEADS * HEAD_DIM, HEAD_DIM, 1)


def test_head_major_has_heads_outermost() -> None:
    assert views("head_major")[0].stride() == (HEAD_DIM, ROWS * HEAD_DIM, 1)


def test_sliced_leaves_gaps_between_heads_and_rows() -> None:
    k, _ = views("sliced")
    assert k.stride(1) > HEAD_DIM
    assert k.stride(0) > 2 * KV_HEADS * k.stride(1)


def test_in_a_mixture_k_and_v_lie_apart_and_differ_in_all_strides() -> None:
    k, v = views("mixed")
    assert k.stride() == (KV_HEADS * HEAD_DIM, HEAD_DIM, 1)
    assert v.stride(1) > HEAD_DIM
    assert v.stride(0) > KV_HEADS * v.stride(1)
    assert k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()


@every_dtype
def test_misaligned_starts_one_element_off(dtype: torch.dtype) -> None:
    for view in views("misaligned", dtype):
        assert view.storage_offset() == 1
        assert view.is_contiguous()


def test_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="'upside_down'"):
        views("upside_down")


@every_memory
def test_writes_then_reads_back(memory: str) -> None:
    buffer = buffer_of(memory)
    buffer.write(0, 4, rows(4), rows(4, 100.0))
    buffer.write(4, 6, rows(2, 200.0), rows(2, 300.0))
    k, v = buffer.read(2, 6)
    assert torch.equal(k, torch.cat([rows(4)[2:], rows(2, 200.0)]))
    assert torch.equal(v, torch.cat([rows(4, 100.0)[2:], rows(2, 300.0)]))


def test_frontier_follows_writes() -> None:
    buffer = buffer_of()
    assert buffer.frontier == 0
    buffer.write(0, 4, rows(4), rows(4))
    assert buffer.frontier == 4


@pytest.mark.parametrize(("begin", "end"), [(0, 4), (3, 5), (5, 7)])
def test_writes_must_continue_at_the_frontier(begin: int, end: int) -> None:
    buffer = buffer_of()
    buffer.write(0, 4, rows(4), rows(4))
    with pytest.raises(ValueError, match=rf"\[{begin}, {end}\).*filled to 4 of {ROWS}"):
        buffer.write(begin, end, rows(end - begin), rows(end - begin))


def test_capacity_can_be_filled_and_not_exceeded() -> None:
    buffer = buffer_of()
    buffer.write(0, ROWS, rows(ROWS), rows(ROWS))
    with pytest.raises(ValueError, match=rf"filled to {ROWS} of {ROWS}"):
        buffer.write(ROWS, ROWS + 1, rows(1), rows(1))


def test_a_refused_write_changes_nothing() -> None:
    buffer = buffer_of()
    buffer.write(0, 4, rows(4), rows(4))
    before = buffer.k.clone(), buffer.v.clone()
    with pytest.raises(ValueError, match="do not continue"):
        buffer.write(4, ROWS + 1, rows(6, 50.0), rows(6, 50.0))
    assert buffer.frontier == 4
    assert same_bits(buffer.k, before[0])
    assert same_bits(buffer.v, before[1])


@every_memory
def test_a_write_leaves_other_rows_alone(memory: str) -> None:
    buffer = buffer_of(memory)
    buffer.k.fill_(-1.0)
    buffer.v.fill_(-2.0)
    buffer.write(0, 4, rows(4), rows(4))
    assert (buffer.k[4:] == -1.0).all()
    assert (buffer.v[4:] == -2.0).all()


@every_memory
def test_reads_are_in_place(memory: str) -> None:
    buffer = buffer_of(memory)
    buffer.write(0, 4, rows(4), rows(4))
    for view, whole in zip(buffer.read(1, 4), (buffer.k, buffer.v), strict=True):
        assert view.data_ptr() == whole[1].data_ptr()
        assert view.stride() == whole.stride()


def test_views_saved_by_autograd_survive_later_writes() -> None:
    buffer = buffer_of()
    buffer.write(0, 4, rows(4), rows(4))
    k, _ = (view.requires_grad_() for view in buffer.read(0, 4))
    loss = k.square().sum()
    buffer.write(4, 6, rows(2), rows(2))
    (gradient,) = torch.autograd.grad(loss, k)
    assert torch.equal(gradient, 2 * rows(4))


def test_each_read_has_its_own_version_counter() -> None:
    buffer = buffer_of()
    buffer.write(0, 4, rows(4), rows(4))
    k, v = buffer.read(0, 4)
    versions = k._version, v._version
    buffer.write(4, 6, rows(2), rows(2))
    assert (k._version, v._version) == versions


@every_dtype
def test_gradients_start_at_zero_in_float32(dtype: torch.dtype) -> None:
    buffer = buffer_of(dtype=dtype)
    for gradient in (buffer.dk, buffer.dv):
        assert gradient.dtype == torch.float32
        assert gradient.shape == (ROWS, KV_HEADS, HEAD_DIM)
        assert not gradient.any()


def test_accumulate_adds_over_its_extent_only() -> None:
    buffer = buffer_of()
    buffer.accumulate(2, 6, rows(4, 1.0), rows(4, 2.0))
    buffer.accumulate(0, 3, rows(3, 3.0), rows(3, 4.0))
    dk, dv = torch.zeros_like(buffer.dk), torch.zeros_like(buffer.dv)
    dk[2:6], dv[2:6] = rows(4, 1.0), rows(4, 2.0)
    dk[0:3] += rows(3, 3.0)
    dv[0:3] += rows(3, 4.0)
    assert torch.equal(buffer.dk, dk)
    assert torch.equal(buffer.dv, dv)


def test_accumulates_low_precision_gradients_in_float32() -> None:
    """256 + 1 is no bfloat16."""
    buffer = buffer_of(dtype=torch.bfloat16)
    for value in (256.0, 1.0):
        gradient = torch.full((1, KV_HEADS, HEAD_DIM), value, dtype=torch.bfloat16)
        buffer.accumulate(0, 1, gradient, gradient)
    assert (buffer.dk[0] == 257.0).all()
    assert (buffer.dv[0] == 257.0).all()


@every_dtype
def test_gradients_come_back_in_the_storage_dtype(dtype: torch.dtype) -> None:
    buffer = buffer_of(dtype=dtype)
    buffer.accumulate(0, 4, rows(4), rows(4, 8.0))
    dk, dv = buffer.gradients(1, 3)
    assert dk.dtype == dv.dtype == dtype
    assert torch.equal(dk.float(), rows(4)[1:3])
    assert torch.equal(dv.float(), rows(4, 8.0)[1:3])
