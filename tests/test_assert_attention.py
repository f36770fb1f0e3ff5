"""``assert_attention`` on inputs of realistic size: right results of every backend pass, faults are named."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from devices import but_forced_slow, needs_cuda

from attn_fuzz import AttentionMismatch, assert_attention
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.known import issues_of
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend, calls_of
from attn_fuzz.execution.observation import in_our_convention
from attn_fuzz.oracle import own_inputs
from attn_fuzz.oracle.off_by_factor import factors
from attn_fuzz.oracle.own_inputs import WrongElement
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.reference.answer import Expected, Inputs, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import Span
from attn_fuzz.reference.profile import UNIT_ROUNDOFF, Profile

Tensors = dict[str, torch.Tensor]

BASE = Case(
    level="kernel", lengths=(100, 180, 101), key_lengths=(100, 230, 101), heads=4, kv_heads=2, head_dim=64, causal=True
)
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"window": (64, -1)},
    "fp16": {"softcap": 20.0, "scale": 0.2},
}
SIMPLER: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 0.0},
    {"scale": None, "softcap": 0.0},
    {"window": (-1, -1)},
    {"kv_heads": 4},
    {"key_lengths": None},
    {"key_lengths": None, "window": (-1, -1), "softcap": 0.0, "scale": None},
    {"causal": False, "window": (-1, -1), "softcap": 0.0, "scale": None, "kv_heads": 4, "key_lengths": None},
)
"""What a backend does not take is left out, the first of these that helps."""

# No mark ``cuda``: that a backend is not installed, or takes no float32, is no failure of a machine with a GPU.
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])


def case_for(backend: Backend, device: str, dtype: str) -> Case | None:
    """A case of a dtype with as many options as a backend takes, and no known issue of it; or None."""
    stated = backend.kernel.capabilities_on(device)
    for simpler in SIMPLER:
        options = {**OPTIONS[dtype], **simpler}
        for configuration in stated.configurations or (None,):
            if configuration is not None:
                fixed = {**configuration._asdict(), "window": (-1, -1), "scale": None}
                options = {**options, **fixed, "key_lengths": None}
            case = BASE.replace(**{"dtype": dtype, **options})
            known = issues_of(backend.name, device, case, calls_of(case))
            if case.dtype == dtype and backend.refusal(case, device) is None and not known:
                return case
    return None


def call(case: Case, backend: Backend, device: str, inputs: Inputs | None = None) -> dict[str, Any]:
    """A backend's forward and backward over a case's tensors or others, as arguments of ``assert_attention``."""
    inputs, where = inputs or kernel_inputs(case, device), torch.device(device)
    metadata = VarlenMetadata(lengths_q=case.packed_lengths, lengths_k=case.packed_key_lengths, device=where)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    attended = backend.kernel.attend(*leaves, metadata, AttentionOptions.of(case))
    gradients = torch.autograd.grad(attended.out, leaves, inputs.dout)
    lse = None if attended.lse is None else in_our_convention(attended.lse.detach().T, backend, where)
    return {
        **{name: getattr(inputs, name) for name in ("q", "k", "v", "dout")},
        **{"out": attended.out.detach(), "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))},
        **{"cu_seqlens_q": metadata.cu_seqlens_q, "cu_seqlens_k": metadata.cu_seqlens_k},
        **{"causal": case.causal, "window": case.window, "softmax_scale": case.scale, "softcap": case.softcap},
    }


def arithmetic_of(backend: Backend, device: str) -> dict[str, Any]:
    """What a backend says of its own arithmetic, as its user would."""
    profile, default = backend.kernel.profile_on(device), Profile()
    names = (field.name for field in dataclasses.fields(Profile))
    return {name: got for name in names if (got := getattr(profile, name)) != getattr(default, name)}


@on_every_device
@pytest.mark.parametrize("dtype", OPTIONS)
@pytest.mark.parametrize("name", but_forced_slow(registry.backend_names()))
def test_right_results_pass(name: str, dtype: str, device: str) -> None:
    backend = registry.load(name)
    if reason := backend.kernel.why_unavailable(device):
        pytest.skip(reason)
    if (case := case_for(backend, device, dtype)) is None:
        pytest.skip(f"{name} takes no {dtype} there")
    assert_attention(**call(case, backend, device), arithmetic=arithmetic_of(backend, device))


# Faults.

SPANS = {"q": ((0, 100), (100, 280), (280, 381)), "k": ((0, 100), (100, 330), (330, 431))}
SCALE = BASE.head_dim**-0.5


@functools.cache
def right(dtype: str) -> dict[str, Any]:
    """Right results of a dtype; not to be written."""
    return call(BASE.replace(dtype=dtype), registry.load("loop"), "cpu")


def shifted_row(given: Tensors) -> None:
    given["out"][110] = given["out"][109]


def swapped_heads(given: Tensors) -> None:
    given["out"][280:, [0, 3]] = given["out"][280:, [3, 0]]


def no_dk(given: Tensors) -> None:
    given["dk"][100:330] = 0


def scaled(given: Tensors) -> None:
    given["dq"][100:280, 2] = (given["dq"][100:280, 2].float() * 1.01).to(given["dq"].dtype)


def base_two(given: Tensors) -> None:
    given["lse"] = given["lse"] / math.log(2)


def last_key_missing(given: Tensors) -> None:
    """The last row of the last document does not see its own key."""
    k, v = (given[name][330:430, 0].double() for name in ("k", "v"))
    weights = (given["q"][380, 1].double() @ k.T * SCALE).softmax(-1)
    given["out"][380, 1] = (weights @ v).to(given["out"].dtype)


def exchanged_dv(given: Tensors) -> None:
    """As many rows of the last document as of the first."""
    given["dv"][[5, 335]] = given["dv"][[335, 5]]


def nan_channel(given: Tensors) -> None:
    given["out"][:, 1, 17] = torch.nan


def flipped_head(given: Tensors) -> None:
    given["dv"][:, 1] *= -1


def foreign_row(given: Tensors) -> None:
    given["dq"][283] = given["dq"][20]


Fault = Callable[[Tensors], None]
FAULTS: dict[str, tuple[Fault, str, dict[str, Any]]] = {
    "a row shifted": (shifted_row, "out", {"documents": (1,), "rows": (10,)}),
    "a head swapped": (swapped_heads, "out", {"documents": (2,), "heads": (0, 3)}),
    "a document's dK zeroed": (no_dk, "dk", {"documents": (1,), "heads": (0, 1)}),
    "scale off by 1 %": (scaled, "dq", {"documents": (1,), "heads": (2,)}),
    "LSE in base 2": (base_two, "lse", {"documents": (0, 1, 2), "heads": (0, 1, 2, 3), "channel": None}),
    "last key missing": (last_key_missing, "out", {"documents": (2,), "rows": (100,), "heads": (1,)}),
    "dV of two documents exchanged": (exchanged_dv, "dv", {"documents": (0, 2), "row": 5}),
    "a channel NaN": (nan_channel, "out", {"documents": (0, 1, 2), "heads": (1,), "channels": (17,), "wrong": 381}),
    "a sign flipped in a head": (flipped_head, "dv", {"documents": (0, 1, 2), "heads": (1,)}),
    "a row of another document": (foreign_row, "dq", {"documents": (2,), "rows": (3,)}),
}


@pytest.mark.parametrize(("fault", "dtype"), [*zip(FAULTS, itertools.cycle(OPTIONS))])
def test_a_fault_is_named_at_its_place(fault: str, dtype: str) -> None:
    change, tensor, place = FAULTS[fault]
    given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in right(dtype).items()}
    change(given)
    with pytest.raises(AttentionMismatch) as raised:
        assert_attention(**given)
    (wrong,) = raised.value.wrong
    assert wrong.tensor == tensor
    assert {name: getattr(wrong, name) for name in place} == place
    assert wrong.document in wrong.documents
    assert wrong.head in wrong.heads
    first, last = SPANS["k" if tensor in ("dk", "dv") else "q"][wrong.document]
    got = given[tensor][first:last][wrong.row, wrong.head]
    shown = got if wrong.channel is None else got[wrong.channel]
    assert shown.item() == wrong.got or math.isnan(wrong.got)


def test_ten_faults_are_tried() -> None:
    assert len(FAULTS) == 10


def test_right_results_of_those_inputs_pass() -> None:
    for dtype in OPTIONS:
        assert_attention(**right(dtype))


def test_a_factor_is_told_as_one() -> None:
    given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in right("bf16").items()}
    scaled(given)
    with pytest.raises(
        AttentionMismatch, match=r"off by a factor of 1\.0\d+ as a whole, in documents 1, rows 0-179, heads 2"
    ):
        assert_attention(**given)


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_one_percent_in_half_precision_is_told_of_every_result(name: str) -> None:
    given = dict(right("bf16"))
    given[name] = (given[name].float() * 1.01).bfloat16()
    with pytest.raises(AttentionMismatch) as raised:
        assert_attention(**given)
    (wrong,) = raised.value.wrong
    assert wrong.tensor == name
    assert wrong.factor == pytest.approx(1.01, abs=1e-3)


def test_small_differences_of_large_terms_may_be_rounded_off() -> None:
    """Far from zero, dQ is what is left of terms hundreds of times as large, whose roundings are percents of it."""
    case, backend = BASE.replace(dtype="bf16"), registry.load("backup")
    drawn = kernel_inputs(case, "cpu")
    shifted = Inputs(drawn.q + 2, drawn.k + 2, drawn.v + 3, drawn.dout + 1)
    assert_attention(**call(case, backend, "cpu", shifted))


# Factors: what roundings may do together.


def uniform(queries: int, keys: int) -> tuple[torch.Tensor, Expected]:
    """Means of ``keys`` values under weights that are all rounded alike, each row's budget that of its own rounding."""
    values = torch.randn(queries, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor(1 / keys).bfloat16().double() * keys
    variance = 0.18 * UNIT_ROUNDOFF["bf16"] ** 2 * values.square()
    return (weight * values).bfloat16(), Expected(values, variance, torch.full((queries, 1), 64.0))


@pytest.mark.parametrize("keys", [3, 5, 15, 31, 63, 100])
def test_equal_weights_may_be_rounded_alike(keys: int) -> None:
    got, expected = uniform(200, keys)
    assert not factors("bf16", got, expected, [Span(0, 200)]).wrong.any()
    assert factors("bf16", (got.float() * 1.02).bfloat16(), expected, [Span(0, 200)]).wrong.all()


def test_a_document_without_rows_has_no_factor() -> None:
    got, expected = uniform(20, 3)
    found = factors("bf16", got, expected, [Span(0, 0), Span(0, 20)])
    assert found.value[0].item() == 1.0
    assert not found.wrong[0].any()


# The second opinion.


@pytest.fixture
def mistaken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The vectorised reference is wrong about the results that are listed."""
    names: list[str] = []
    correct = own_inputs.kernel_answer

    def answer(*arguments: Any) -> dict[str, Expected]:
        found = correct(*arguments)
        for name in names:
            value = found[name].value.clone()
            value[0] += 1.0
            found[name] = dataclasses.replace(found[name], value=value)
        return found

    monkeypatch.setattr(own_inputs, "kernel_answer", answer)
    return names


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_a_mistake_of_the_harness_is_no_mismatch(name: str, mistaken: list[str]) -> None:
    mistaken.append(name)
    with pytest.raises(ReferencesDisagree, match=f"{name} at"):
        assert_attention(**right("fp32"))


def test_nothing_is_asked_twice_where_all_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("the second opinion was asked for")

    monkeypatch.setattr(own_inputs, "confirm_results", never)
    assert_attention(**right("bf16"))


def test_places_are_readable() -> None:
    where: dict[str, Any] = {"rows": (0, 1, 2, 7), "heads": (0,), "channels": tuple(range(0, 40, 2))}
    wrong = WrongElement("dv", 1, 2, 0, 4, 1.5, 1.25, 40.0, 30, 640, (1,), **where)
    assert str(wrong) == (
        "dv: document 1, key 2, head 0, channel 4: got 1.5, expected 1.25, z = 40; 30 of 640 elements wrong, "
        "in documents 1, keys 0-2, 7, heads 0, channels 0, 2, 4, 6, 8, 10, 12, 14, ..."
    )
