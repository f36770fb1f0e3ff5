"""The buffered layer by itself: no reference, only what must hold between its own runs, and with the legacy layer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from devices import needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends.layer import BufferedLayer, Normed
from attn_fuzz.backends.legacy import LegacyLayer
from attn_fuzz.backends.registry import Backend, load
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import DTYPES, Case
from attn_fuzz.reference.layer import LayerInputs, layer_inputs
from attn_fuzz.reference.layout import active_extent, micro_sequences
from attn_fuzz.reference.memory import same_bits
from attn_fuzz.reference.weights import NORM_EPSILON

CPU = torch.device("cpu")
SENTINEL = 7.0

STRADDLING = Case(lengths=(4, 1, 10), padding=2, cuts=(7, 12), heads=4, kv_heads=2, capacity=3)
"""Dead rows before the second and third micro-sequence, a document over three of them, GQA, spare rows."""

LAYERS = {
    "plain": STRADDLING,
    "norms": STRADDLING.replace(query_norm="rms", key_norm="rms", value_norm="rms", rotary="default"),
    "shared": STRADDLING.replace(shared_key_value=True, key_norm="rms", rotary="proportional"),
    "window": STRADDLING.replace(window=(3, -1), softcap=3.0),
    "empty documents": STRADDLING.replace(lengths=(0, 4, 0, 1, 10, 0)),
    "boundaries": STRADDLING.replace(causal=False, cuts=(4, 15)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_memory = pytest.mark.parametrize("memory", ["contiguous", "fused", "head_major", "sliced", "misaligned"])


def results(backend: Backend, case: Case, poison: str = "none") -> dict[str, torch.Tensor]:
    return Trial(case, backend, CPU).observe(poison).results


def build(case: Case, kernel: str = "loop") -> tuple[BufferedLayer, LayerInputs]:
    inputs = layer_inputs(case, CPU)
    return BufferedLayer(inputs.weights, case, load(kernel).kernel), inputs


def buffers(layer: BufferedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    key_value = layer.key_value()
    assert key_value is not None
    return key_value


def gradient_buffers(layer: BufferedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = layer.key_value_gradients()
    assert gradients is not None
    return gradients


def all_forward(case: Case) -> tuple[BufferedLayer, LayerInputs]:
    layer, inputs = build(case)
    for part in micro_sequences(case):
        layer.forward(inputs.x[slice(*part)], *part)
    return layer, inputs


def test_a_layer_that_is_never_taken_back_is_freed() -> None:
    layer, _ = all_forward(STRADDLING)
    seen = weakref.ref(layer)
    del layer
    gc.collect()
    assert seen() is None


# Cuts.


@pytest.mark.parametrize("kernel", ["loop", "backup"])
@every_layer
def test_results_do_not_depend_on_cuts(name: str, kernel: str) -> None:
    case, backend = LAYERS[name], load(kernel)
    cut, whole = results(backend, case), results(backend, case.replace(cuts=()))
    assert cut.keys() == whole.keys()
    for tensor in whole:
        torch.testing.assert_close(cut[tensor], whole[tensor], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) > 1), st.data())
def test_outputs_and_gradients_do_not_depend_on_drawn_cuts(lengths: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, sum(lengths) - 1), min_size=1, max_size=4))
    case = Case(lengths=tuple(lengths), cuts=tuple(sorted(cuts)), rotary="default")
    cut, whole = results(load("loop"), case), results(load("loop"), case.replace(cuts=()))
    for tensor in whole:
        torch.testing.assert_close(cut[tensor], whole[tensor], rtol=1e-5, atol=1e-5)


@every_memory
def test_results_do_not_depend_on_memory(memory: str) -> None:
    backend, case = load("loop"), STRADDLING
    placed, plain = results(backend, case.replace(memory=memory)), results(backend, case)
    assert all(same_bits(placed[tensor], plain[tensor]) for tensor in plain)


@every_layer
def test_poison_changes_no_bit(name: str) -> None:
    nan, finite = (results(load("loop"), LAYERS[name], poison) for poison in ("nan", "finite"))
    assert all(same_bits(nan[tensor], finite[tensor]) for tensor in nan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameter_gradients_are_float32_and_the_rest_is_stored(dtype: str) -> None:
    case = STRADDLING.replace(dtype=dtype, query_norm="rms")
    found = results(load("loop"), case)
    stored = layer_inputs(case, CPU).x.dtype
    wide = {"dk", "dv", "d_query", "d_key_value", "d_dense", "d_query_norm"}
    assert {tensor: value.dtype for tensor, value in found.items()} == {
        tensor: torch.float32 if tensor in wide else stored for tensor in found
    }


# The buffer.


@every_memory
def test_forward_leaves_rows_beyond_the_frontier_alone(memory: str) -> None:
    case = STRADDLING.replace(memory=memory)
    layer, inputs = build(case)
    for tensor in buffers(layer):
        tensor.fill_(SENTINEL)
    for part in micro_sequences(case):
        layer.forward(inputs.x[slice(*part)], *part)
        for tensor in buffers(layer):
            assert (tensor[part.end :] == SENTINEL).all()
            assert (tensor[slice(*part)] != SENTINEL).any()


def test_forward_keeps_earlier_rows() -> None:
    layer, inputs = build(STRADDLING)
    before: list[torch.Tensor] = []
    for part in micro_sequences(STRADDLING):
        layer.forward(inputs.x[slice(*part)], *part)
        for old, tensor in zip(before, buffers(layer), strict=False):
            assert same_bits(tensor[: len(old)], old)
        before = [tensor[: part.end].clone() for tensor in buffers(layer)]


def test_backward_keeps_the_buffer() -> None:
    layer, inputs = all_forward(STRADDLING)
    before = [tensor.clone() for tensor in buffers(layer)]
    for part in reversed(micro_sequences(STRADDLING)):
        layer.backward(inputs.dout[slice(*part)])
    assert all(same_bits(old, tensor) for old, tensor in zip(before, buffers(layer), strict=True))


def test_forward_leaves_gradients_at_zero() -> None:
    layer, _ = all_forward(STRADDLING)
    assert not any(tensor.any() for tensor in gradient_buffers(layer))


@every_layer
def test_gradients_accumulate_over_the_active_extent_only(name: str) -> None:
    case = LAYERS[name]
    layer, inputs = all_forward(case)
    for part in reversed(micro_sequences(case)):
        before = [tensor.clone() for tensor in gradient_buffers(layer)]
        layer.backward(inputs.dout[slice(*part)])
        extent = slice(*active_extent(case.packed_lengths, part))
        outside = torch.ones(len(before[0]), dtype=torch.bool)
        outside[extent] = False
        for old, tensor in zip(before, gradient_buffers(layer), strict=True):
            assert same_bits(tensor[outside], old[outside])
            assert not same_bits(tensor[extent], old[extent])


def test_gradients_of_rows_that_only_later_cuts_attend_to_reach_the_input() -> None:
    """dout of the last micro-sequence alone: earlier tokens of the straddling document get a gradient, others none."""
    layer, inputs = all_forward(Case(lengths=(4, 1, 10), cuts=(7,)))
    layer.backward(inputs.dout[7:])
    dx = layer.backward(torch.zeros_like(inputs.dout[:7]))
    assert not dx[:5].any()
    assert dx[5:].any(1).all()


def test_micro_sequences_must_come_in_order() -> None:
    layer, inputs = build(STRADDLING)
    with pytest.raises(ValueError, match="do not continue"):
        layer.forward(inputs.x[7:12], 7, 12)


def test_paths_name_what_ran() -> None:
    layer, inputs = build(STRADDLING)
    assert layer.paths() == frozenset()
    layer.forward(inputs.x[:7], 0, 7)
    assert layer.paths() == {"loop"}


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("kernel", ["sdpa_dense", "backup"])
def test_forward_makes_no_host_sync(kernel: str) -> None:
    case = STRADDLING.replace(query_norm="rms", rotary="default")
    inputs = layer_inputs(case, "cuda")
    layer = BufferedLayer(inputs.weights, case, load(kernel).kernel)
    parts = micro_sequences(case)
    layer.forward(inputs.x[slice(*parts[0])], *parts[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in parts[1:]:
            layer.forward(inputs.x[slice(*part)], *part)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The legacy layer.


@pytest.mark.parametrize("poison", ["none", "nan"])
@every_layer
def test_legacy_forward_is_right_to_the_bit(name: str, poison: str) -> None:
    """What made the bug invisible: no output shows it under any content of unwritten memory."""
    case = LAYERS[name]
    legacy, canonical = (results(load(backend), case, poison) for backend in ("legacy:loop", "loop"))
    assert same_bits(legacy["out"], canonical["out"])


NO_DEAD_ROWS = {
    "one micro-sequence": Case(lengths=(4, 1, 10)),
    "one document": Case(lengths=(10,), cuts=(4, 7), heads=2, rotary="default", value_norm="rms"),
    "first document straddles": Case(lengths=(9, 3), cuts=(2, 8)),
}


@pytest.mark.parametrize("name", NO_DEAD_ROWS)
def test_legacy_gradients_agree_where_no_row_is_dead(name: str) -> None:
    case = NO_DEAD_ROWS[name]
    legacy, canonical = (results(load(backend), case, "nan") for backend in ("legacy:loop", "loop"))
    for tensor, value in legacy.items():
        torch.testing.assert_close(value, canonical[tensor], rtol=1e-5, atol=1e-6)


def test_legacy_gradients_hold_unwritten_memory_where_rows_are_dead() -> None:
    case = Case(lengths=(4, 1, 10), cuts=(7,))
    found = results(load("legacy:loop"), case, "nan")
    for tensor in ("dk", "dv", "dx"):
        assert found[tensor].isnan().flatten(1).any(1).tolist() == [True] * 5 + [False] * 10


def test_legacy_has_no_buffer() -> None:
    inputs = layer_inputs(STRADDLING, CPU)
    assert LegacyLayer(inputs.weights, STRADDLING, load("loop").kernel).key_value() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_differentiated_as_its_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(7, 3, 16, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(16, generator=generator) + 0.5
    own_x, own_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = Normed.apply(own_x, own_weight)
    out.backward(dy)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + NORM_EPSILON) * exact_weight
    exact.backward(dy.double())
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert out.dtype == own_x.grad.dtype == dtype  # type: ignore[union-attr]
    for got, meant in ((out, exact), (own_x.grad, exact_x.grad)):
        torch.testing.assert_close(got.double(), meant, rtol=rounding, atol=rounding)  # type: ignore[union-attr]
    torch.testing.assert_close(own_weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
