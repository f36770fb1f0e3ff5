"""The case: what is possible survives JSON, what is not is told in one sentence."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.strategies import cases
from attn_fuzz.reference.case import LEVELS, MAX_HEAD_DIM, MAX_HEADS, MAX_TOKENS, Case, CaseError

DRAWN = st.one_of(*(cases(level, Domain.of(Capabilities(), "cpu")) for level in LEVELS))

# Every field at something other than its default, where its level allows that.
LAYER = Case(
    lengths=(4, 0, 3),
    padding=2,
    cuts=(1, 5),
    document_ids=(2, 0, 9),
    heads=4,
    kv_heads=2,
    head_dim=6,
    hidden=5,
    window=(2, -1),
    scale=0.25,
    softcap=3.0,
    query_norm="rms",
    key_norm="rms",
    value_norm="rms",
    shared_key_value=True,
    rotary="proportional",
    rotary_theta=300.0,
    rotary_fraction=0.25,
    dtype="bf16",
    values="tiny",
    weights="selection",
    seed=(1 << 32) - 1,
    memory="sliced",
    capacity=3,
)
KERNEL = Case(level="kernel", lengths=(2, 3), key_lengths=(4, 0), causal=False, window=(1, 2), memory="broadcast")
RANKS = Case(lengths=(4, 4), cuts=(2, 6), ranks=2)


# There and back.


@pytest.mark.parametrize("case", [LAYER, KERNEL, RANKS, Case()], ids=["layer", "kernel", "ranks", "default"])
def test_cases_survive_json(case: Case) -> None:
    assert Case.from_json(case.to_json()) == case
    assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
    assert "\n" not in case.to_json()
    assert hash(Case.from_json(case.to_json())) == hash(case)


@settings(max_examples=40, deadline=None)
@given(case=DRAWN)
def test_json_says_what_differs_from_the_defaults(case: Case) -> None:
    written = case.to_dict()
    assert {"level", "lengths"} <= set(written)
    for field in dataclasses.fields(case):
        if field.name not in ("level", "lengths"):
            assert (field.name in written) == (getattr(case, field.name) != field.default)


def test_defaults_are_those_that_stored_cases_rely_on() -> None:
    """A stored case leaves defaults out: changing one would make it another case."""
    defaults = {field.name: field.default for field in dataclasses.fields(Case)}
    assert defaults == {
        "level": "layer",
        "lengths": (1,),
        "key_lengths": None,
        "padding": 0,
        "cuts": (),
        "ranks": 1,
        "tensor_ranks": 1,
        "document_ids": None,
        "padding_ids": (),
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 16,
        "hidden": 16,
        "causal": True,
        "window": (-1, -1),
        "scale": None,
        "softcap": 0.0,
        "query_norm": "none",
        "key_norm": "none",
        "value_norm": "none",
        "shared_key_value": False,
        "rotary": "none",
        "rotary_theta": 10000.0,
        "rotary_fraction": 0.5,
        "dtype": "fp32",
        "values": "gaussian",
        "weights": "gaussian",
        "seed": 0,
        "memory": "contiguous",
        "capacity": 0,
        "lse_gradient": False,
        "loose_max_seqlen": (0, 0),
        "gaps": (0, 0),
        "head_dim_v": None,
    }


def test_padding_lies_between_documents_and_behind_the_last() -> None:
    case = Case(lengths=(3, 2, 0, 4), document_ids=(7, 5, 2, 9), padding_ids=(2, 5, 11), padding=3)
    # One without rows is nowhere, and what names no document says nothing.
    assert case.padding_spans == ((3, 5), (9, 12))
    assert Case.from_json(case.to_json()) == case
    assert Case(lengths=(3,)).padding_spans == ()


def test_lists_become_tuples() -> None:
    case = Case(lengths=[2, 3], cuts=[1], window=[1, -1])  # type: ignore[arg-type]
    assert (case.lengths, case.cuts, case.window) == ((2, 3), (1,), (1, -1))


# What a case says beyond its fields.


@settings(max_examples=40, deadline=None)
@given(case=DRAWN)
def test_padding_is_a_last_document(case: Case) -> None:
    assert sum(case.packed_lengths) == case.tokens
    assert len(case.packed_lengths) == len(case.packed_key_lengths) == len(case.packed_ids)
    assert len(set(case.packed_ids)) == len(case.packed_ids)
    assert (case.packed_lengths != case.lengths) == (case.padding > 0)


def test_what_is_derived() -> None:
    assert (LAYER.tokens, LAYER.packed_lengths, LAYER.packed_ids) == (9, (4, 0, 3, 2), (2, 0, 9, MAX_TOKENS))
    assert (KERNEL.packed_lengths, KERNEL.packed_key_lengths) == ((2, 3), (4, 0))
    assert (LAYER.effective_window, KERNEL.effective_window) == ((2, 0), (1, 2))
    assert (LAYER.softmax_scale, KERNEL.softmax_scale) == (0.25, 0.25)


# What cannot be.

IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no documents": ({"lengths": []}, "lengths is empty"),
    "no tokens": ({"lengths": [0, 0]}, "this one has 0"),
    "negative length": ({"lengths": [3, -1]}, "cannot be negative"),
    "too many tokens": ({"lengths": [MAX_TOKENS, 1]}, f"{MAX_TOKENS + 1}"),
    "lengths that are one number": ({"lengths": 3}, "a list of whole numbers, not 3"),
    "lengths in words": ({"lengths": "12"}, "not '12'"),
    "broken lengths": ({"lengths": [1.5]}, "[1.5]"),
    "true is no number": ({"lengths": [True]}, "lengths must be"),
    "negative padding": ({"padding": -1}, "cannot be negative"),
    "negative capacity": ({"capacity": -1}, "cannot be negative"),
    "padding in words": ({"padding": "2"}, "not '2'"),
    "no heads": ({"heads": 0}, "0 heads"),
    "too many heads": ({"heads": MAX_HEADS}, "heads"),
    "no kv_heads": ({"kv_heads": 0}, "0 kv_heads"),
    "heads that cannot be shared": ({"heads": 4, "kv_heads": 3}, "4 heads cannot share 3 kv_heads"),
    "no head_dim": ({"head_dim": 0}, "not 0"),
    "too wide": ({"head_dim": MAX_HEAD_DIM + 1}, "not 577"),
    "values too wide": ({"level": "kernel", "head_dim_v": MAX_HEAD_DIM + 1}, "head_dim_v must be between 1 and 576"),
    "values of a layer": ({"head_dim_v": 8}, "head_dim_v belongs to kernel cases"),
    "no hidden": ({"hidden": 0}, "hidden"),
    "no ranks": ({"ranks": 0}, "ranks"),
    "causal in words": ({"causal": "yes"}, "true or false, not 'yes'"),
    "causal as a number": ({"causal": 1}, "true or false, not 1"),
    "half a window": ({"window": [1]}, "[left, right]"),
    "window below -1": ({"window": [-2, 0], "causal": False}, "[-2, 0]"),
    "a causal case that looks right": ({"window": [0, 1]}, "window asks for 1"),
    "infinite scale": ({"scale": float("inf")}, "a finite number"),
    "scale in words": ({"scale": "1"}, "not '1'"),
    "negative softcap": ({"softcap": -1.0}, "-1.0"),
    "NaN softcap": ({"softcap": float("nan")}, "finite"),
    "unknown dtype": ({"dtype": "fp64"}, "fp32, bf16, fp16, not 'fp64'"),
    "no dtype": ({"dtype": None}, "not None"),
    "unknown level": ({"level": "model"}, "kernel, layer"),
    "unknown values": ({"values": "random"}, "gaussian"),
    "unknown memory": ({"memory": "scattered"}, "contiguous"),
    "unknown rotary": ({"rotary": "left"}, "proportional"),
    "rotary of odd heads": ({"rotary": "default", "head_dim": 5}, "head_dim 5 is odd"),
    "rotary_theta 1": ({"rotary_theta": 1.0}, "must exceed 1"),
    "no rotary_fraction": ({"rotary_fraction": 0.0}, "(0, 1]"),
    "negative seed": ({"seed": -1}, "not -1"),
    "packed seed": ({"seed": 1 << 32}, str(1 << 32)),
    "too few ids": ({"lengths": [1, 2], "document_ids": [0]}, "name every document once"),
    "ids twice": ({"lengths": [1, 2], "document_ids": [1, 1]}, "name every document once"),
    "negative ids": ({"document_ids": [-1]}, "from 0"),
    "cut at the beginning": ({"lengths": [4], "cuts": [0]}, "[0]"),
    "cut at the end": ({"lengths": [4], "cuts": [4]}, "between 0 and 4"),
    "cuts that go back": ({"lengths": [4], "cuts": [2, 1]}, "[2, 1]"),
    "a cut twice": ({"lengths": [4], "cuts": [2, 2]}, "strictly"),
    "a non-causal cut inside": ({"lengths": [4, 4], "cuts": [4, 6], "causal": False}, "the cut at 6"),
    "ranks that do not divide": ({"lengths": [4], "cuts": [3], "ranks": 2}, "2 ranks"),
    "keys of a layer case": ({"key_lengths": [1]}, "keys come from cuts"),
    "broadcast layer": ({"memory": "broadcast"}, "belongs to kernel cases"),
    "too few keys": ({"level": "kernel", "lengths": [1, 2], "key_lengths": [1]}, "every document"),
    "negative keys": ({"level": "kernel", "key_lengths": [-1]}, "zero or more"),
    "too many keys": ({"level": "kernel", "key_lengths": [MAX_TOKENS + 1]}, "keys"),
    "cuts of a kernel case": ({"level": "kernel", "lengths": [4], "cuts": [2]}, "cuts belongs to layer cases"),
    "padding of a kernel case": ({"level": "kernel", "padding": 1}, "padding belongs to layer cases"),
    "padding between documents of a kernel case": (
        {"level": "kernel", "padding_ids": [0]},
        "padding_ids belongs to layer cases",
    ),
    "padding named twice": ({"lengths": [1, 2], "padding_ids": [1, 1]}, "padding_ids must increase, from 0 on"),
    "padding and nothing else": ({"lengths": [1, 2], "padding_ids": [0, 1, 2]}, "padding_ids name all documents"),
    "padding before the first name": ({"lengths": [1, 2], "padding_ids": [-1]}, "padding_ids must increase, from 0 on"),
    "ranks of a kernel case": ({"level": "kernel", "ranks": 2}, "ranks belongs to layer cases"),
    "rotary of a kernel case": ({"level": "kernel", "rotary": "default"}, "rotary belongs to layer cases"),
    "unknown key": ({"length": [1]}, "unknown key 'length'"),
    "unhashable choice": ({"dtype": ["fp32"]}, "not ['fp32']"),
    "window in words": ({"window": "11"}, "not '11'"),
    "a nested list": ({"lengths": [[1]]}, "[[1]]"),
    "no cuts at all": ({"cuts": None}, "cuts"),
    "no window at all": ({"window": None}, "window"),
    "no lengths at all": ({"lengths": None}, "lengths"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_impossible_is_one_sentence(name: str) -> None:
    fields, told = IMPOSSIBLE[name]
    with pytest.raises(CaseError) as refused:
        Case.from_dict(fields)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"case"', "3", "[" * 100_000])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(CaseError):
        Case.from_json(text)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.floats(), st.none(), st.text(max_size=2)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=DRAWN, name=st.sampled_from([field.name for field in dataclasses.fields(Case)]), junk=JUNK)
def test_junk_in_a_field_is_refused_or_makes_a_case(case: Case, name: str, junk: object) -> None:
    """Of any content of a file nothing but a CaseError comes; what is taken survives JSON."""
    try:
        taken = Case.from_dict({**case.to_dict(), name: junk})
    except CaseError:
        return
    assert Case.from_json(taken.to_json()) == taken


def test_changes_are_validated_again() -> None:
    with pytest.raises(CaseError, match="strictly"):
        LAYER.replace(lengths=(1,), padding=0, document_ids=None)


def test_of_many_documents_people_are_told_how_many() -> None:
    few = Case(level="kernel", lengths=(3, 1), key_lengths=(4, 2), head_dim=8)
    assert few.in_short() == few.to_json()
    many = Case(level="kernel", lengths=(1,) * 65537, key_lengths=(2,) * 65536 + (9,), head_dim=8)
    assert many.in_short() == (
        '{"level": "kernel", "lengths": "65,537 times 1", "key_lengths": "65,537 of 2 to 9", "head_dim": 8}'
    )
