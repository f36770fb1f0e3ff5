"""How tensors lie in memory: strides and offsets are those of the layout's name, and guards see every write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends import registry
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.runner import KernelCall
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import MEMORIES, Case
from attn_fuzz.reference.memory import MARGIN, Placed, bits, layout_of, place, same_bits

ROWS, HEADS, CHANNELS = 3, 2, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Strides of [rows, heads, channels], and the offset in the allocation.
LAYOUTS = {
    "contiguous": ((8, 4, 1), MARGIN),
    "fused": ((16, 4, 1), MARGIN),
    "head_major": ((4, 12, 1), MARGIN),
    "sliced": ((36, 12, 1), MARGIN),
    "misaligned": ((8, 4, 1), MARGIN + 1),
    "strided": ((16, 8, 2), MARGIN),
    "broadcast": ((8, 4, 1), MARGIN),
}
every_memory = pytest.mark.parametrize("memory", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def values(dtype: str = "fp32", rows: int = ROWS, heads: int = HEADS, channels: int = CHANNELS) -> torch.Tensor:
    """Whole numbers from 1, each once."""
    count = rows * heads * channels
    return torch.arange(1, count + 1, dtype=torch.float32).view(rows, heads, channels).to(DTYPES[dtype])


@every_memory
@every_dtype
def test_a_layout_is_what_its_name_says(memory: str, dtype: str) -> None:
    x = values(dtype)
    placed = place(x, memory, torch.nan)
    assert (placed.tensor.stride(), placed.tensor.storage_offset()) == LAYOUTS[memory]
    assert same_bits(placed.tensor, x)
    assert placed.tensor.untyped_storage().data_ptr() == placed.storage.untyped_storage().data_ptr()
    assert placed.changed() is None


@every_memory
@pytest.mark.parametrize("filler", [torch.nan, 203.0])
def test_whatever_is_not_a_value_holds_the_filler(memory: str, filler: float) -> None:
    placed = place(values(), memory, filler)
    rest = placed.storage[~torch.isin(placed.storage, values())]
    assert len(placed.storage) - len(rest) == values().numel()
    assert (rest.isnan() if filler != filler else rest == filler).all()
    margins = (placed.storage[:MARGIN], placed.storage[-MARGIN:])
    assert not any(torch.isin(margin, values()).any() for margin in margins)


def test_only_the_misaligned_are() -> None:
    """128-bit accesses need addresses that are multiples of 16 bytes."""
    for memory in LAYOUTS:
        address = place(values(), memory, 0.0).tensor.data_ptr()
        assert (address % 16 == 0) == (memory != "misaligned")


@pytest.mark.parametrize(("shared", "stride"), [(0, (0, 4, 1)), (1, (4, 0, 1))])
def test_what_repeats_itself_is_kept_once(shared: int, stride: tuple[int, ...]) -> None:
    x = values().narrow(shared, 1, 1).expand(ROWS, HEADS, CHANNELS)
    placed = place(x, "broadcast", torch.nan, shared)
    assert placed.tensor.stride() == stride
    assert same_bits(placed.tensor, x)
    assert len(placed.storage) == 2 * MARGIN + x.numel() // x.shape[shared]
    assert placed.changed() is None


NAMES = ("q", "k", "v", "dout")
CPU = torch.device("cpu")


def test_every_layout_but_the_mixture_is_that_of_all_tensors_alike() -> None:
    assert set(LAYOUTS) == set(MEMORIES) - {"mixed"}
    for memory in LAYOUTS:
        assert {layout_of(name, memory) for name in NAMES} == {memory}
    assert {layout_of(name, "mixed") for name in NAMES} == {"contiguous", "fused", "head_major", "sliced"}


def test_a_tensor_by_itself_is_no_mixture() -> None:
    with pytest.raises(ValueError, match="'mixed'"):
        place(values(), "mixed", 0.0)


def strides(case: Case) -> list[dict[str, tuple[int, ...]]]:
    """The strides of q, k, v and dout of a kernel case by itself and in a batch."""
    inputs = kernel_inputs(case, "cpu")
    call = KernelCall(registry.load("loop"), case, inputs, "nan", CPU)
    (tensors,) = BatchTensors(CallBatch.of_one(case.replace(capacity=0)), inputs, CPU).of_calls
    return [
        {name: call.placed[name].tensor.stride() for name in NAMES},
        {name: tensor.stride() for name, tensor in zip(NAMES, tensors, strict=True)},
    ]


@pytest.mark.parametrize("capacity", [0, 3])
@pytest.mark.parametrize("groups", [(2, 2), (4, 2), (3, 3)])
def test_nothing_in_a_mixture_has_the_strides_of_its_like(groups: tuple[int, int], capacity: int) -> None:
    heads, kv_heads = groups
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": 4, "capacity": capacity}
    case = Case(level="kernel", lengths=(3, 2), memory="mixed", **options)  # type: ignore[arg-type]
    for found in strides(case):
        assert len(set(found.values())) == 4
        for one, other in (("k", "v"), ("q", "dout")):
            assert all(a != b for a, b in zip(found[one][:2], found[other][:2], strict=True))
    for found in strides(case.replace(memory="sliced")):
        assert (found["k"], found["q"]) == (found["v"], found["dout"])


@pytest.mark.parametrize("head_dim", [1, 8, 16])
def test_nor_with_a_single_head(head_dim: int) -> None:
    for found in strides(Case(level="kernel", lengths=(3, 2), head_dim=head_dim, memory="mixed")):
        assert found["k"][0] < found["v"][0]
        assert found["q"][0] < found["dout"][0]


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4, 5), (0, 2, 4), (1, 1, 1)])
def test_any_shape_can_lie_contiguously(shape: tuple[int, ...]) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    placed = place(x, "contiguous", 0.0)
    assert same_bits(placed.tensor, x)
    assert placed.tensor.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    memory=st.sampled_from(sorted(LAYOUTS)),
    rows=st.integers(0, 5),
    heads=st.integers(1, 4),
    channels=st.integers(1, 9),
    dtype=st.sampled_from(sorted(DTYPES)),
    data=st.data(),
)
def test_one_bit_anywhere_is_seen_for_what_it_is(
    memory: str, rows: int, heads: int, channels: int, dtype: str, data: st.DataObject
) -> None:
    placed = place(values(dtype, rows, heads, channels), memory, torch.nan)
    inside = torch.zeros(len(placed.storage), dtype=torch.bool)
    inside.as_strided(placed.tensor.shape, placed.tensor.stride(), placed.tensor.storage_offset()).fill_(True)
    place_of_change = data.draw(st.integers(0, len(placed.storage) - 1))
    bits(placed.storage)[place_of_change] ^= 1
    assert placed.changed() == ("values" if inside[place_of_change] else "guard margins")


def flipped(changes: torch.Tensor) -> str | None:
    """What is seen of a change to the first value of a tensor."""
    placed: Placed = place(changes[:1].expand(4).contiguous(), "contiguous", 0.0)
    placed.tensor[0] = changes[1]
    return placed.changed()


@pytest.mark.parametrize(("before", "after"), [(0.0, -0.0), (1.0, 1.0 + 2**-23), (1.0, torch.nan)])
def test_changes_of_bits_are_changes(before: float, after: float) -> None:
    assert flipped(torch.tensor([before, after])) == "values"


def test_nan_that_stays_is_no_change() -> None:
    assert flipped(torch.tensor([torch.nan, torch.nan])) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.tensor([0.0]), torch.tensor([0.0], dtype=torch.bfloat16), False),
        (torch.tensor([1.0, 2.0, 3.0, 4.0])[::2], torch.tensor([1.0, 3.0]), True),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.tensor([2**60 + 1]), torch.tensor([2**60]), False),
    ],
)
def test_same_bits(a: torch.Tensor, b: torch.Tensor, same: bool) -> None:
    assert same_bits(a, b) == same
