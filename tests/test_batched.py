"""The batched reference gives what the pure one gives: values, variances, degrees, however it is cut into chunks."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from attn_fuzz.backends import registry
from attn_fuzz.reference import answer, batched, vectorised
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import DTYPES, Case
from attn_fuzz.reference.profile import ACCUMULATION, Profile

PROFILES = (
    Profile(),
    Profile(normalises_by_lse=True),
    Profile(scales_inputs=True, scales_gradients=True, rounds_scores=True, rounds_dp=True, stores_probabilities=True),
    Profile(delta_from_output=False, delta_from_probabilities=True, expands_kv=True, tanh_error=2.0**-11),
    Profile(delta_from_probabilities=True, rounds_dp=True, stores_probabilities=True, stores_products=True),
    Profile(stores_partial_sums=True, scales_gradients=True),
    Profile(products="tf32", normalises_by_lse=True),
    Profile(products="fp16", scores_dtype="bf16", delta_from_probabilities=True, expands_kv=True),
    Profile(products="bf16", probabilities_dtype="fp16", exp_error=2.0**-9, scales_gradients=True),
    Profile(scores_dtype="fp16", may_store_products=True, delta_from_probabilities=True, delta_from_output=False),
    Profile(atomic_sums=frozenset({"dq", "dk"}), expands_kv=True, probabilities_dtype="bf16"),
    Profile(rounds_probabilities=False, rounds_ds=False, delta_from_output=False),
    Profile(rounds_probabilities=False, rounds_dp=True, may_store_products=True, stores_probabilities=True),
    Profile(rounds_ds=False, scores_dtype="fp16", products="tf32", rounds_dp=True),
    Profile(splits_ds=True, stores_probabilities=True, rounds_dp=True, tanh_error=2.0**-11),
)


@st.composite
def packed_cases(draw: st.DrawFn) -> Case:
    """Documents with q < k, q = k, q > k and without either, windows, groups, softcap, causal and not."""
    pair = st.tuples(st.integers(0, 20), st.integers(0, 23))
    pairs = draw(st.lists(pair, min_size=1, max_size=8).filter(lambda found: all(map(sum, zip(*found)))))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    causal = draw(st.booleans())
    side = st.sampled_from([-1, 0, 1, 4])
    return Case(
        level="kernel",
        lengths=tuple(q for q, _ in pairs),
        key_lengths=tuple(k for _, k in pairs),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 5, 16])),
        head_dim_v=draw(st.sampled_from([None, None, 2, 20])),
        causal=causal,
        window=(draw(side), -1 if causal else draw(side)),
        scale=draw(st.sampled_from([None, 0.5])),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        # Not "ties": what is 0 there in one order of summing is 1e-17 in another, and only one of them is subnormal.
        values=draw(st.sampled_from(["gaussian", "large", "offset", "tiny"])),
        seed=draw(st.integers(0, 5)),
        lse_gradient=draw(st.booleans()),
    )


def difference(got: torch.Tensor, wanted: torch.Tensor, terms: torch.Tensor | float = 1e-300) -> float:
    """Largest difference relative to the row's largest magnitude, or to the terms of the sums that it holds."""
    scale = wanted.abs().maximum(torch.as_tensor(terms)).amax(-1, keepdim=True).clamp_min(1e-300)
    return torch.where(got == wanted, 0.0, (got - wanted).abs() / scale).max().item() if got.numel() else 0.0


def assert_both_agree(case: Case, profile: Profile, memory: int | None) -> None:
    """Both references on the same tensors."""
    inputs = kernel_inputs(case, "cpu")
    got = batched.kernel_answer(case, inputs, profile, memory=memory)
    wanted = answer.kernel_answer(case, inputs, profile)
    # Where terms cancel, what is left is a rounding error of theirs; float32's budget, over a, is their size.
    in_float32 = answer.kernel_answer(case.replace(dtype="fp32"), inputs, Profile())
    # A dS that is 0 in one order of summing and 1e-17 in another has the rounding error of a subnormal in one of them,
    # which beside what else a row that sees one key may be off is little, and in bf16 and float32 nothing.
    vague = 1e-5 if case.dtype == "fp16" else 1e-7
    for name, expected in wanted.items():
        # What cancels to 0 in one order of summing is 1e-16 in another, and only one of them has a rounding error.
        alike = (got[name].value == 0) == (expected.value == 0)
        if name == "lse":
            assert torch.equal(got[name].value.isinf(), expected.value.isinf())
            finite = expected.value.isfinite()
            assert torch.allclose(got[name].value[finite], expected.value[finite], rtol=1e-12, atol=1e-12)
        else:
            terms = in_float32[name].variance.sqrt() / ACCUMULATION
            assert difference(got[name].value, expected.value, terms) <= 1e-12, name
            whole = alike.all(-1)
            assert torch.allclose(got[name].degrees[whole], expected.degrees[whole], rtol=vague), name
        # The errors of a tanh, or of scores in half precision, 2^-11, cancel down to float32's where a row sees one
        # key, and leave a rounding error of their own size.
        coarse = (case.softcap and profile.tanh_error) or profile.scores_dtype
        cancels = coarse and case.dtype == "fp32"
        close = vague if case.dtype == "fp16" else 1e-8 if cancels else 1e-9
        assert difference(torch.where(alike, got[name].variance, expected.variance), expected.variance) <= close, name
        # Equality is demanded of the same rows: those that have no partner.
        dead = [(each[name].variance == 0).reshape(len(expected.value), -1).all(1) for each in (got, wanted)]
        assert torch.equal(*dead), name


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    case=packed_cases(),
    profile=st.sampled_from(PROFILES),
    memory=st.sampled_from([1, 1 << 16, 1 << 30]),
    scores=st.sampled_from([1, 1 << 15]),
)
def test_equals_the_pure_reference(case: Case, profile: Profile, memory: int, scores: int) -> None:
    # With 1, queries are taken eight at a time.
    with mock.patch.object(vectorised, "_CPU_SCORES", scores):
        assert_both_agree(case, profile, memory)


@pytest.mark.parametrize("dims", [(1, None), (5, None), (5, 3)])
@pytest.mark.parametrize("profile", PROFILES)
def test_blocks_of_rows_whose_heads_share_keys(profile: Profile, dims: tuple[int, int | None]) -> None:
    options = {"heads": 2, "kv_heads": 1, "head_dim": dims[0], "head_dim_v": dims[1]}
    case = Case(level="kernel", lengths=(3, 20), key_lengths=(30, 21), **options)
    with mock.patch.object(vectorised, "_CPU_SCORES", 1):
        assert_both_agree(case, profile, None)


@pytest.mark.parametrize("causal", [True, False])
def test_long_documents_beside_short_ones(causal: bool) -> None:
    case = Case(
        level="kernel",
        lengths=(130, 1, 0, 300, 64, 7),
        key_lengths=(300, 1, 5, 130, 65, 0),
        heads=2,
        head_dim=8,
        causal=causal,
        dtype="bf16",
    )
    assert_both_agree(case, Profile(), None)


@given(memory=st.integers(1, 1 << 24), lengths=st.lists(st.integers(0, 200), min_size=1, max_size=50).filter(any))
def test_chunks_cover_every_document_once_and_stay_within_memory(memory: int, lengths: list[int]) -> None:
    case = Case(level="kernel", lengths=tuple(lengths), heads=2, head_dim=4)
    chunks = batched.plan_chunks(case, memory)
    assert sorted(index for _, _, members in chunks for index in members) == list(range(len(lengths)))
    for queries, keys, members in chunks:
        assert all(lengths[index] <= min(queries, keys) for index in members)
        one = batched.plan_chunks(case, 0, members[:1])
        assert len(one) == 1
        assert len(members) == 1 or len(members) * 8 * 2 * 16 * queries * keys <= memory


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that exist at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor) and (key := id(x.untyped_storage())) not in self.sizes:
                self.sizes[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.sizes.pop, key, None)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(("softcap", "values"), [(0.0, "large"), (20.0, "gaussian")])
def test_a_chunk_takes_about_the_memory_that_was_planned(
    softcap: float, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: all queries at once.
    monkeypatch.setattr("attn_fuzz.reference.vectorised._CPU_SCORES", 1 << 30)
    case = Case(
        level="kernel",
        lengths=(64, 64),
        key_lengths=(128, 128),
        heads=4,
        kv_heads=2,
        head_dim=64,
        dtype="bf16",
        softcap=softcap,
        values=values,
    )
    inputs = kernel_inputs(case, "cpu")
    planned = next(size for size in range(1 << 20, 1 << 28, 1 << 18) if len(batched.plan_chunks(case, size)) == 1)
    for profile in {registry.load(name).kernel.profile_on("cuda") for name in registry.kernel_names()}:
        with Alive() as alive:
            for _ in batched.answers(case, inputs, profile, memory=1 << 40, degrees=True):
                pass
        assert 0.4 * planned < alive.most < 1.1 * planned


def test_some_documents_of_a_call() -> None:
    case = Case(level="kernel", lengths=(3, 9, 3, 5), heads=2, kv_heads=1, head_dim=4)
    inputs = kernel_inputs(case, "cpu")
    whole = answer.kernel_answer(case, inputs, Profile())
    chunks = list(batched.answers(case, inputs, Profile(), documents=[2]))
    (chunk,) = chunks
    assert chunk.documents.tolist() == [2]
    assert torch.allclose(chunk.expected["dk"].value[0].transpose(0, 1)[:3], whole["dk"].value[12:15], rtol=1e-12)


def test_beyond_the_table_sizes_are_multiples() -> None:
    assert [batched.padded_size(n) for n in (0, 1, 5, 128, 129, 300)] == [2, 2, 8, 128, 256, 384]
