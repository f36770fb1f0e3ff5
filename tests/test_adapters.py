"""Kernels of other shapes, adapted: a right one is clean, a wrong one convicted, what cannot be is one sentence."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import adapted_kernels
import pytest
import torch
from adapted_kernels import prefill, sdpa, with_lengths

from attn_fuzz import adapters
from attn_fuzz.adapters import AdaptedKernel, Lse
from attn_fuzz.api import CheckError, _importable
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import UserKernel
from attn_fuzz.oracle.examine import Verdict, examine
from attn_fuzz.reference.case import Case

PLAIN = Case(level="kernel", lengths=(4, 0, 3), heads=4, kv_heads=4, head_dim=8, causal=False, dtype="fp16")
CASES = {
    "non-causal": PLAIN,
    "causal": PLAIN.replace(causal=True, dtype="bf16", kv_heads=2),
    "more keys": PLAIN.replace(causal=True, dtype="fp32", key_lengths=(7, 3, 5)),
    "window": PLAIN.replace(causal=True, dtype="fp32", window=(1, -1), key_lengths=(4, 0, 5)),
    "scale": PLAIN.replace(scale=0.9, causal=True, dtype="fp32"),
    "spare rows": PLAIN.replace(causal=True, dtype="fp32", capacity=3),
    "keys alone": PLAIN.replace(lengths=(0, 2), key_lengths=(3, 2), dtype="fp32"),
    "nothing": PLAIN.replace(lengths=(0, 2), key_lengths=(3, 0), dtype="fp32"),
    "layer": Case(lengths=(3, 4), cuts=(2, 5), heads=2, kv_heads=2, head_dim=4, hidden=8),
}


def loaded(name: str) -> Backend:
    return registry.load(f"adapted_kernels:{name}")


def verdict(name: str, case: str) -> Verdict:
    return examine(CASES[case], loaded(name), "cpu")


RIGHT = {
    "dense_mask": ("non-causal", "more keys", "window", "spare rows", "layer"),
    "dense_lengths": ("causal", "keys alone"),
    "dense_key_mask": ("non-causal", "keys alone"),
    "block_mask": ("more keys", "window"),
    "block_ids": ("causal", "scale"),
    "document_bshd": ("causal", "spare rows"),
    "document_mask": ("more keys", "window"),
    "document_lse": ("causal", "more keys"),
    "order": ("causal", "more keys"),
    "qkv": ("non-causal", "scale"),
    "kv": ("causal", "more keys"),
    "forward": ("causal", "more keys", "layer"),
    "forward_lse": ("more keys",),
    "module": ("causal", "more keys"),
    "instance": ("causal",),
    "blind_dense": ("nothing",),
    "blind_block": ("nothing",),
    "blind_document": ("nothing",),
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in RIGHT.items() for case in cases])
def test_a_right_kernel_is_clean(name: str, case: str) -> None:
    found = verdict(name, case)
    assert not found.symptoms
    judged_lse = isinstance(loaded(name).kernel, UserKernel) and bool(loaded(name).kernel.capabilities.lse)
    assert ("lse" in found.worst_z) == (judged_lse and CASES[case].level == "kernel")


WRONG = {
    "wrong_axes": ("non-causal", "WrongOutput"),
    "wrong_last_row": ("non-causal", "WrongOutput"),
    "wrong_block": ("non-causal", "WrongOutput"),
    "wrong_key_mask": ("non-causal", "WrongOutput"),
    "wrong_lse_zeros": ("non-causal", "WrongLse"),
    "wrong_lse_base": ("causal", "WrongLse"),
    "wrong_order": ("non-causal", "WrongOutput"),
    "wrong_qkv": ("non-causal", "WrongOutput"),
    "wrong_forward": ("scale", "WrongOutput"),
    "wrong_module": ("scale", "WrongOutput"),
    "wrong_top_left": ("more keys", "WrongOutput"),
    "misshapen_document": ("non-causal", "MissingResult"),
    "misshapen_lse": ("non-causal", "MissingResult"),
    "no_lse": ("non-causal", "MissingResult"),
}


@pytest.mark.parametrize(("name", "case", "symptom"), [(name, *rest) for name, rest in WRONG.items()])
def test_a_wrong_kernel_is_convicted(name: str, case: str, symptom: str) -> None:
    found = verdict(name, case)
    assert symptom in {type(each).__name__ for each in found.symptoms}, found.symptoms


REFUSED = {
    ("dense_lengths", "more keys"): "different numbers of queries and keys",
    ("dense_mask", "causal"): "fewer kv_heads than heads",
    ("qkv", "keys alone"): "as many keys as queries only",
    ("block_ids", "keys alone"): "as many keys as queries only",
    ("dense_key_mask", "causal"): "causal attention",
}


@pytest.mark.parametrize(("name", "case", "said"), [(*what, said) for what, said in REFUSED.items()])
def test_what_a_shape_does_not_take_is_refused(name: str, case: str, said: str) -> None:
    with pytest.raises(UnsupportedCase, match=said):
        verdict(name, case)


def test_the_gradients_of_a_forward_are_the_references() -> None:
    """They are right where the output is not, so that only the output is accused."""
    found = verdict("wrong_forward", "scale")
    assert {each.tensor for each in found.symptoms} == {"out"}


def test_capabilities_are_what_is_given_before_what_is_said_before_what_the_shape_has() -> None:
    def function(q: Any, k: Any, v: Any, *, causal: bool) -> Any: ...

    assert adapters.by_document(function).capabilities["causal_needs_equal_lengths"]
    function.capabilities = {"max_head_dim": 64, "causal_needs_equal_lengths": False}  # type: ignore[attr-defined]
    assert not adapters.by_document(function).capabilities["causal_needs_equal_lengths"]
    given = adapters.by_document(function, capabilities={"max_head_dim": 32}).capabilities
    assert (given["max_head_dim"], given["queries_without_keys"]) == (32, False)


def without_hint(q: Any, k: Any, v: Any) -> Any: ...


CANNOT: dict[str, tuple[Callable[[], object], str]] = {
    "no padding": (lambda: adapters.dense(without_hint), "told nothing of padding"),
    "no batch": (lambda: adapters.dense(with_lengths, layout="shd"), "told nothing of padding"),
    "no documents": (lambda: adapters.block_diagonal(without_hint), "tells the function documents apart"),
    "layout": (lambda: adapters.by_document(sdpa, layout="bsd"), "made of b, s, h and d"),
    "layout of an LSE": (lambda: Lse("hd"), "layout of an LSE"),
    "base of an LSE": (lambda: Lse("hs", base="3"), "base of an LSE"),
    "name offered": (lambda: adapters.by_document(sdpa, names={"scale": "scale"}), "names has 'scale'"),
    "name taken": (lambda: adapters.varlen(prefill, names={"softcap": "cap"}), "softcap is 'cap', but the function"),
    "argument": (lambda: adapters.varlen(prefill, arguments=("q", "keys")), "arguments has 'keys'"),
    "module": (lambda: adapters.from_module(lambda width: torch.nn.Identity()), "'width' is no option"),
}


@pytest.mark.parametrize(("make", "said"), CANNOT.values(), ids=CANNOT)
def test_what_cannot_be_adapted_is_one_sentence(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_options_that_are_not_given_have_the_defaults_of_varlen_kernels() -> None:
    given: dict[str, Any] = {}

    def function(q: Any, k: Any, v: Any, *, softmax_scale: Any, causal: Any, window_size: Any, softcap: Any) -> Any:
        given.update(softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap)
        return q

    sums, x = torch.tensor([0, 2], dtype=torch.int32), torch.ones(2, 1, 4)
    adapters.by_document(function)(x, x, x, sums, sums, 2, max_seqlen_k=2, softcap=3.0)
    assert given == {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 3.0}


# Importable by another process.


def test_what_is_adapted_is_imported_by_the_variable_that_holds_it() -> None:
    assert _importable(adapted_kernels.dense_mask, "kernel") == "adapted_kernels:dense_mask"
    assert _importable(adapted_kernels.document_bshd, "kernel") == "adapted_kernels:document_bshd"
    with pytest.raises(CheckError, match="cannot be imported by another process"):
        _importable(partial(prefill), "kernel")


# JAX.


def attention(library: Any, q: Any, k: Any, v: Any, lengths: Any, scale: float, wrong: float = 1.0) -> Any:
    """``[b, h, s, d]`` in operations that JAX and torch share."""
    scores = library.einsum("bhqd,bhkd->bhqk", q, k) * scale
    keys = library.arange(k.shape[2])
    scores = library.where((keys < lengths[:, None])[:, None, None], scores, -library.inf)
    weights = library.exp(scores - library.amax(scores, -1)[..., None])
    return wrong * library.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1)[..., None], v)


def of_jax(library: Any, wrong: float = 1.0) -> AdaptedKernel:
    def function(q: Any, k: Any, v: Any, *, lengths_k: Any, softmax_scale: float) -> Any:
        return attention(library, q, k, v, lengths_k, softmax_scale, wrong)

    return adapters.dense(
        adapters.from_jax(function),
        layout="bhsd",
        capabilities={"gqa": False, "dtypes": ("fp32",), "devices": ("cpu",)},
    )


def examined(kernel: AdaptedKernel, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    monkeypatch.setattr(adapted_kernels, "in_hand", kernel, raising=False)
    return examine(CASES["keys alone"].replace(scale=0.7), loaded("in_hand"), "cpu")


def test_jax_functions_run_by_way_of_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for JAX made of torch, which has the same functions under the same names."""
    stand_in = types.SimpleNamespace(
        dlpack=types.SimpleNamespace(from_dlpack=torch.from_dlpack),
        block_until_ready=lambda x: x,
        tree=types.SimpleNamespace(map=lambda function, x: torch.utils._pytree.tree_map(function, x)),
        vjp=torch.func.vjp,
    )
    monkeypatch.setitem(sys.modules, "jax", stand_in)
    assert not examined(of_jax(torch), monkeypatch).symptoms
    first = examined(of_jax(torch, wrong=1.001), monkeypatch).first
    assert type(first).__name__ == "WrongOutput"


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="the package jax is not installed")
def test_jax_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax.numpy

    assert not examined(of_jax(jax.numpy), monkeypatch).symptoms
    assert examined(of_jax(jax.numpy, wrong=1.001), monkeypatch).symptoms
