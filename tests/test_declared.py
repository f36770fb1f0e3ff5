"""What user code may say of its arithmetic: names and values that are taken, and docs that list them all."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import How, kernel

from attn_fuzz.backends.arithmetic import NAMED, declared_facts
from attn_fuzz.backends.kernel import BackendUnavailable, Capabilities
from attn_fuzz.backends.user import _CAUTIOUS, _CAUTIOUS_LAYER, UserKernel
from attn_fuzz.oracle.known_answer.census import equal_product
from attn_fuzz.oracle.known_answer.needle_gain import needle_gain
from attn_fuzz.oracle.known_answer.slack import (
    holds_whole_numbers,
    needle_slack,
    stores_dq,
    support_slack,
    weight_error,
)
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import layer_answer, layer_inputs
from attn_fuzz.reference.profile import Profile

DOCS = (Path(__file__).parent.parent / "docs" / "arithmetic.md").read_text()
CASE = Case(level="kernel", lengths=(70,), heads=2, head_dim=8)


def facts(arithmetic: object) -> dict[str, Any]:
    return declared_facts(SimpleNamespace(capabilities={"arithmetic": arithmetic}), "mine")


def rows() -> dict[str, list[str]]:
    """By fact: its default and its example, as the tables have them."""
    lines = [line.split(" | ") for line in DOCS.splitlines() if line.startswith("| `")]
    return {line[0].strip("|` "): [line[1], line[3].strip("| ")] for line in lines}


def test_the_docs_list_every_field_with_its_default() -> None:
    assert set(rows()) == {field.name for field in dataclasses.fields(Profile)}
    for name, (shown, _) in rows().items():
        value = getattr(_CAUTIOUS_LAYER if "for layers" in shown else _CAUTIOUS, name)
        if shown == "on CPUs":
            continue
        told = eval(re.findall("`(.*?)`", shown)[0])
        assert (frozenset(told) if isinstance(told, list) else told) == value, name
        if "for layers" not in shown:
            assert getattr(_CAUTIOUS_LAYER, name) == value


def test_every_example_of_the_docs_is_taken() -> None:
    for name, (_, example) in rows().items():
        values = [eval(text) for text in re.findall(r"`([^`]*)`(?=[:,])", example)]
        assert values, name
        for value in values:
            assert facts({name: value})


@pytest.mark.parametrize(
    ("arithmetic", "sentence"),
    [
        (["products"], "arithmetic must be a dict, or a name, not list"),
        ({"tf32": True}, "arithmetic has an unknown fact 'tf32'; known: atomic_sums, "),
        ({3: True}, "unknown fact '3'"),
        ({"products": "fp8"}, "products must be '' or 'tf32' or 'bf16' or 'fp16', not 'fp8'"),
        ({"products": ["tf32"]}, "products must be '' or 'tf32'"),
        ({"scores_dtype": "tf32"}, "scores_dtype must be '' or 'bf16' or 'fp16', not 'tf32'"),
        ({"rounds_scores": 1}, "rounds_scores must be True or False, not 1"),
        ({"exp_error": "2**-8"}, "exp_error must be a relative error from 0 to 0.125, not '2**-8'"),
        ({"exp_error": 1.0}, "exp_error must be a relative error from 0 to 0.125, not 1.0"),
        ({"exp_error": float("nan")}, "exp_error must be a relative error"),
        ({"exp_error": True}, "exp_error must be a relative error"),
        ({"atomic_sums": "dq"}, "atomic_sums must be a list of dq, dk, dv, not 'dq'"),
        ({"atomic_sums": ["out"]}, "atomic_sums must be a list of dq, dk, dv"),
        ({"atomic_sums": [["dq"]]}, "atomic_sums must be a list of dq, dk, dv"),
        ({"stored_sums": [1]}, "stored_sums must be a list of results"),
        ("exact", "arithmetic is like 'fused' or 'float32', not like 'exact'"),
        ({"like": 3}, "arithmetic is like 'fused' or 'float32', not like 3"),
    ],
)
def test_what_is_no_fact_is_refused_in_a_sentence(arithmetic: object, sentence: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"mine\.capabilities: arithmetic|unknown fact") as refused:
        facts(arithmetic)
    assert sentence in str(refused.value)


def test_a_name_stands_for_its_facts_but_for_those_that_are_said_beside_it() -> None:
    assert facts("fused") == facts({"like": "fused"}) == dict(NAMED["fused"])
    mine = facts({"like": "float32", "rounds_dp": True, "tanh_error": 0.0})
    assert mine == {**NAMED["float32"], "rounds_dp": True, "tanh_error": 0.0}


def of(arithmetic: dict[str, object]) -> UserKernel:
    import emulated

    emulated.tried = kernel(How(), arithmetic)  # type: ignore[attr-defined]
    return UserKernel("emulated:tried")


def test_single_fields_change_and_the_rest_stays() -> None:
    for device in ("cpu", "cuda"):
        default, mine = (of(x).profile_on(device) for x in ({}, {"products": "tf32", "rounds_dp": False}))
        assert mine == dataclasses.replace(default, products="tf32", rounds_dp=False)
    assert of({}).profile_on("cpu").stores_partial_sums
    # What is declared holds on all devices.
    assert not of({"stores_partial_sums": False}).profile_on("cpu").stores_partial_sums


def test_a_capabilities_object_has_them_too() -> None:
    owner = SimpleNamespace(capabilities=Capabilities(arithmetic={"exp_error": 2.0**-8}))
    assert declared_facts(owner, "mine") == {"exp_error": 2.0**-8}
    assert declared_facts(SimpleNamespace(), "mine") == {}
    assert hash(owner.capabilities)
    assert declared_facts(SimpleNamespace(capabilities=Capabilities(arithmetic="fused")), "mine") == NAMED["fused"]


# Exact probes.


def test_probes_are_as_exact_as_ever_where_nothing_is_declared() -> None:
    for profile in (Profile(), _CAUTIOUS):
        assert needle_slack(CASE, profile) == 2.0**-18
        assert support_slack(CASE, profile, 0.0) == 0.02
        for dtype, u in (("bf16", 2.0**-8), ("fp16", 2.0**-11)):
            assert needle_slack(CASE.replace(dtype=dtype), profile) == 0.0
            assert weight_error(CASE.replace(dtype=dtype), profile) == u
        assert holds_whole_numbers(CASE, profile)
        assert not stores_dq(CASE, profile)


def test_a_needle_is_as_near_as_what_is_declared_makes_it() -> None:
    assert needle_slack(CASE, Profile(products="tf32")) == pytest.approx(2.0**-10, rel=0.01)
    assert needle_slack(CASE, Profile(products="bf16")) == pytest.approx(2.0**-8, rel=0.01)
    # Half precision is exact in TF32, and a weight of 1 in every format.
    assert needle_slack(CASE.replace(dtype="bf16"), Profile(products="tf32")) == 0.0
    assert needle_slack(CASE.replace(dtype="fp16"), Profile(probabilities_dtype="bf16")) == 0.0
    # Scores of 128 channels in bf16 still stand out by fifteen; of 256 they may not at all.
    assert needle_slack(CASE.replace(head_dim=128), Profile(scores_dtype="bf16")) < 1e-3
    assert needle_slack(CASE.replace(head_dim=256), Profile(scores_dtype="bf16")) == float("inf")


def test_nothing_that_is_kept_in_fp16_overflows() -> None:
    wide = CASE.replace(scale=2.0**-12, head_dim=64)
    assert needle_gain(wide) is not None
    assert needle_gain(wide, fp16=True) is None
    assert needle_slack(wide, Profile(scores_dtype="fp16")) == float("inf")
    products = [equal_product(CASE.replace(seed=seed), fp16=True) for seed in range(4)]
    assert max(map(abs, products)) <= 2.0**15
    assert max(abs(equal_product(CASE.replace(seed=seed))) for seed in range(4)) > 2.0**15


def test_whole_numbers_are_no_whole_numbers_in_fewer_bits() -> None:
    assert not holds_whole_numbers(CASE.replace(dtype="fp16"), Profile(products="bf16"))
    assert holds_whole_numbers(CASE.replace(dtype="fp16"), Profile(products="tf32"))
    assert stores_dq(CASE, Profile(atomic_sums=frozenset({"dq"})))


# Layers.


def layer_budget(dtype: str = "fp32", **fields: Any) -> dict[str, torch.Tensor]:
    case = Case(lengths=(12, 20), cuts=(17,), heads=4, kv_heads=2, head_dim=8, hidden=16, dtype=dtype)
    answer = layer_answer(case, layer_inputs(case, "cpu"), Profile(**fields), 64)
    return {name: expected.variance.mean() for name, expected in answer.items()}


KERNEL_ONLY = {"out", "dx", "dk", "dv", "d_query", "d_key_value", "d_dense"}
ROUNDED_MORE = {
    "products": ("tf32", KERNEL_ONLY),
    "projections": ("tf32", KERNEL_ONLY | {"k", "v"}),
    "scores_dtype": ("fp16", KERNEL_ONLY),
    "probabilities_dtype": ("fp16", KERNEL_ONLY),
    "exp_error": (2.0**-10, KERNEL_ONLY),
}


@pytest.mark.parametrize("field", ROUNDED_MORE)
def test_a_layer_is_allowed_what_is_declared_where_it_enters(field: str) -> None:
    value, larger = ROUNDED_MORE[field]
    before, after = layer_budget(), layer_budget(**{field: value})
    assert {name for name in before if after[name] > 10 * before[name]} == larger
    assert all(after[name] == before[name] for name in before if name not in larger)


def test_a_layer_is_held_to_what_it_promises_not_to_round() -> None:
    promised: dict[str, Any] = {"rounds_probabilities": False, "rounds_ds": False}
    before, after = layer_budget("bf16"), layer_budget("bf16", **promised)
    assert all(after[name] < 0.9 * before[name] for name in ("dk", "dv"))
    assert after["k"] == before["k"]
    # What stays in float32 is stored in the dtype where that is float32.
    assert layer_budget(**promised) == layer_budget()


def test_a_layers_gradients_may_be_added_up_in_the_dtype() -> None:
    before, after = layer_budget("bf16"), layer_budget("bf16", atomic_sums=frozenset({"dk"}))
    assert after["dk"] > 1.3 * before["dk"]
    assert after["dv"] == before["dv"]
    assert after["out"] == before["out"]
