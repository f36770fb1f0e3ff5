"""The reference against autograd in float64, finite differences, and PyTorch's own attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.reference import attention
from attn_fuzz.reference.answer import Inputs, kernel_answer, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.grouping import groups_of
from attn_fuzz.reference.layer import LayerInputs, layer_answer, layer_inputs
from attn_fuzz.reference.layout import call_segments, document_spans
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.weights import NORM_EPSILON

CAPABILITIES = Capabilities(dtypes=("fp32",))
WINDOWS = st.tuples(st.sampled_from([-1, 0, 1, 3]), st.sampled_from([-1, 0, 2]))


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Token-major attention with an explicit mask, written for autograd; rows without keys give 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # A finite mask value keeps rows without keys free of NaN; what it lets through is cleared behind the softmax.
    p = torch.where(mask, scores.masked_fill(~mask, -1e300).softmax(-1), 0.0)
    return torch.einsum("hqk,khd->qhd", p, v)


def brute_force_mask(case: Case) -> torch.Tensor:
    """Which key each query of a kernel case sees, pair by pair, in Python integers."""
    segments = call_segments(case)
    mask = torch.zeros(segments[-1].queries.end, segments[-1].keys.end, dtype=torch.bool)
    left, right = case.window[0], 0 if case.causal else case.window[1]
    for segment in segments:
        for i, j in itertools.product(range(segment.queries.length), range(segment.keys.length)):
            own = i + segment.keys.length - segment.queries.length
            seen = (left < 0 or j >= own - left) and (right < 0 or j <= own + right)
            mask[segment.queries.begin + i, segment.keys.begin + j] = seen
    return mask


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(got, wanted, rtol=1e-11, atol=1e-11)


@st.composite
def small_kernel_cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any))
    keys = draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)).filter(any))
    causal = draw(st.booleans())
    left, right = draw(WINDOWS)
    kv_heads = draw(st.sampled_from([1, 2]))
    return Case(
        level="kernel",
        lengths=tuple(lengths),
        key_lengths=tuple(keys) if draw(st.booleans()) else None,
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 4, 7])),
        causal=causal,
        window=(left, -1 if causal else right),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        values=draw(st.sampled_from(["gaussian", "large", "offset", "tiny"])),
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=30, deadline=None)
@given(case=small_kernel_cases())
def test_kernel_answer_equals_autograd(case: Case) -> None:
    inputs = kernel_inputs(case, "cpu")
    answer = kernel_answer(case, inputs, Profile())
    q, k, v = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = softmax_attention(q, k, v, brute_force_mask(case), case.softmax_scale, case.softcap)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.dout.double())
    for name, wanted in (("out", out), ("dq", dq), ("dk", dk), ("dv", dv)):
        assert close(answer[name].value, wanted.detach()), name


@settings(max_examples=30, deadline=None)
@given(case=small_kernel_cases())
def test_dead_rows_are_owed_exact_zeros(case: Case) -> None:
    answer = kernel_answer(case, kernel_inputs(case, "cpu"), Profile())
    mask = brute_force_mask(case)
    for name, dead in (("dk", ~mask.any(0)), ("dv", ~mask.any(0)), ("dq", ~mask.any(1)), ("out", ~mask.any(1))):
        assert (answer[name].value[dead] == 0).all()
        assert (answer[name].variance[dead] == 0).all()
    assert (answer["lse"].value[~mask.any(1)] == -torch.inf).all()


@settings(max_examples=20, deadline=None)
@given(case=small_kernel_cases(), data=st.data())
def test_documents_are_independent(case: Case, data: st.DataObject) -> None:
    """Other values in one document leave the answers of all others as they were, to the last bit."""
    inputs = kernel_inputs(case, "cpu")
    changed = data.draw(st.sampled_from(call_segments(case)))
    other = [x.clone() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)]
    for tensor, span in zip(other, (changed.queries, changed.keys, changed.keys, changed.queries), strict=True):
        tensor[slice(*span)] += 1
    before, after = kernel_answer(case, inputs, Profile()), kernel_answer(case, Inputs(*other), Profile())
    for segment in call_segments(case):
        if segment.document != changed.document:
            for name in before:
                span = segment.keys if name in ("dk", "dv") else segment.queries
                assert torch.equal(before[name].value[slice(*span)], after[name].value[slice(*span)])


@pytest.mark.parametrize("causal", [True, False])
def test_equals_sdpa_where_torch_is_right(causal: bool) -> None:
    """With as many queries as keys torch's top-left causal mask is the bottom-right one."""
    case = Case(level="kernel", lengths=(9,), heads=4, kv_heads=2, head_dim=8, causal=causal)
    inputs = kernel_inputs(case, "cpu")
    q, k, v = (x.double().transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert close(kernel_answer(case, inputs, Profile())["out"].value, wanted.transpose(0, 1))


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_equal_finite_differences(softcap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, 5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = attention.allowed_keys(3, 5, (2, 0))
    tensors = {"dq": q, "dk": k, "dv": v}
    result = attention.forward(q, k, v, mask, 0.7, softcap)
    gradients = attention.backward(q, k, v, dout, 0.7, result)._asdict()

    def loss() -> float:
        return (attention.forward(q, k, v, mask, 0.7, softcap).out * dout).sum().item()

    for name, tensor in tensors.items():
        numeric = torch.zeros_like(tensor)
        for index in itertools.product(*map(range, tensor.shape)):
            kept = tensor[index].item()
            tensor[index] = kept + 1e-6
            above = loss()
            tensor[index] = kept - 1e-6
            below = loss()
            tensor[index] = kept
            numeric[index] = (above - below) / 2e-6
        assert torch.allclose(gradients[name], numeric, atol=1e-8), name


def autograd_layer(case: Case, inputs: LayerInputs) -> dict[str, torch.Tensor]:
    """The layer over the whole packed sequence with a dense mask, complex rotary, and autograd."""
    x = inputs.x.double().requires_grad_()
    weights = {name: weight.double().requires_grad_() for name, weight in inputs.weights.items()}

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        if name not in weights:
            return y
        return y / (y.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt() * weights[name]

    positions = torch.tensor([p for length in case.packed_lengths for p in range(length)], dtype=torch.float64)
    documents = torch.tensor([d for d, length in enumerate(case.packed_lengths) for _ in range(length)])

    def rotate(y: torch.Tensor) -> torch.Tensor:
        if case.rotary == "none":
            return y
        half = case.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float64) * 2 / case.head_dim
        frequency = case.rotary_theta**-exponents
        if case.rotary == "proportional":
            frequency[-(-half // 2) :] = 0
        turn = torch.polar(torch.ones(len(positions), half, dtype=torch.float64), positions[:, None] * frequency)
        turned = torch.complex(y[..., :half], y[..., half:]) * turn[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    q = (x @ weights["query"].T).unflatten(-1, (case.heads, case.head_dim))
    key_value = (x @ weights["key_value"].T).unflatten(-1, (-1, case.head_dim))
    k0, v0 = (key_value, key_value) if case.shared_key_value else key_value.chunk(2, 1)
    q, k, v = rotate(norm("query_norm", q)), rotate(norm("key_norm", k0)), norm("value_norm", v0)
    # Nodes of their own, so that a shared projection's key and value gradients stay apart.
    k, v = k.clone(), v.clone()
    k.retain_grad()
    v.retain_grad()
    rows = torch.arange(len(documents))
    distance = rows[:, None] - rows
    mask = documents[:, None] == documents
    left, right = case.effective_window
    mask &= (distance <= left) | (left < 0)
    mask &= (-distance <= right) | (right < 0)
    out = softmax_attention(q, k, v, mask, case.softmax_scale, case.softcap).flatten(1) @ weights["dense"].T
    out.backward(inputs.dout.double())
    results = {"out": out.detach(), "k": k.detach(), "v": v.detach(), "dk": k.grad, "dv": v.grad, "dx": x.grad}
    results |= {f"d_{name}": weight.grad for name, weight in weights.items()}
    return {name: value for name, value in results.items() if value is not None}


@st.composite
def small_layer_cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    padding = draw(st.sampled_from([0, 2]))
    total = sum(lengths) + padding
    causal = draw(st.booleans())
    cuts = draw(st.sets(st.integers(1, total - 1), max_size=3)) if causal and total > 1 else set()
    norm = st.sampled_from(["none", "rms"])
    kv_heads = draw(st.sampled_from([1, 2]))
    left, right = draw(WINDOWS)
    return Case(
        lengths=tuple(lengths),
        padding=padding,
        cuts=tuple(sorted(cuts)),
        heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 6])),
        hidden=draw(st.sampled_from([3, 8])),
        causal=causal,
        window=(left, -1 if causal else right),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        query_norm=draw(norm),
        key_norm=draw(norm),
        value_norm=draw(norm),
        shared_key_value=draw(st.booleans()),
        rotary=draw(st.sampled_from(["none", "default", "proportional"])),
        weights=draw(st.sampled_from(["gaussian", "selection"])),
    )


@settings(max_examples=30, deadline=None)
@given(case=small_layer_cases())
def test_layer_answer_equals_autograd(case: Case) -> None:
    inputs = layer_inputs(case, "cpu")
    answer, wanted = layer_answer(case, inputs, Profile()), autograd_layer(case, inputs)
    assert set(answer) == set(wanted)
    for name in answer:
        assert torch.allclose(answer[name].value, wanted[name], rtol=1e-10, atol=1e-10), name


@settings(max_examples=20, deadline=None)
@given(case=small_layer_cases())
def test_layer_values_depend_on_neither_cuts_nor_samples(case: Case) -> None:
    inputs = layer_inputs(case, "cpu")
    answer = layer_answer(case, inputs, Profile())
    uncut = layer_answer(case.replace(cuts=()), inputs, Profile(), samples=2)
    for name in answer:
        assert torch.allclose(answer[name].value, uncut[name].value, rtol=1e-12, atol=1e-12), name


@settings(max_examples=20, deadline=None)
@given(case=small_layer_cases(), stored=st.sampled_from([frozenset(), frozenset({"dk", "dv"})]))
def test_documents_side_by_side_equal_one_at_a_time(case: Case, stored: frozenset[str]) -> None:
    inputs, profile = layer_inputs(case, "cpu"), Profile(stored_sums=stored)
    together = layer_answer(case, inputs, profile, samples=128)
    with pytest.MonkeyPatch.context() as patch:
        one_by_one = lambda spans, *_: [[span] for span in spans if span.length]  # noqa: E731
        patch.setattr("attn_fuzz.reference.layer.groups_of", one_by_one)
        alone = layer_answer(case, inputs, profile, samples=128)
    for name, answer in alone.items():
        assert torch.allclose(together[name].value, answer.value, rtol=1e-12, atol=1e-12), name
        # What owes bits owes them either way; what does not, differs by the noise of the samples.
        assert torch.equal(together[name].variance == 0, answer.variance == 0), name
        # Of few elements, whose errors have one source, it is a sample's tails that differ.
        sums = [each.variance.sum().item() for each in (together[name], answer)]
        assert min(sums) >= 0.4 * max(sums), name


def test_documents_are_padded_to_others_of_about_their_length() -> None:
    spans = document_spans((3, 0, 129, 9, 1, 16, 4, 129))
    groups = [groups_of(spans, 8, torch.device(kind)) for kind in ("cpu", "cuda")]
    cpu, cuda = ([[span.length for span in group] for group in each] for each in groups)
    assert cpu == [[3, 1, 4], [9, 16], [129], [129]]
    # A GPU takes longer to be told of a group than to pad it.
    assert cuda == [[3, 1, 4], [129, 129], [9, 16]]


def test_no_group_of_documents_has_more_scores_than_fit() -> None:
    spans = document_spans((64, 3, 64, 60, 64))
    groups = groups_of(spans, 2 * (1 << 23) // (5 * 64**2), torch.device("cpu"))
    assert [[span.length for span in group] for group in groups] == [[64, 64], [60, 64], [3]]


def test_layer_gradients_equal_finite_differences() -> None:
    case = Case(lengths=(2, 3), heads=2, head_dim=2, hidden=3, key_norm="rms", rotary="default")
    inputs = layer_inputs(case, "cpu")
    answer = layer_answer(case, inputs, Profile())
    doubles = LayerInputs(
        inputs.x.double(), inputs.dout.double(), {name: weight.double() for name, weight in inputs.weights.items()}
    )

    def loss() -> float:
        return (layer_answer(case, doubles, Profile(), samples=1)["out"].value * doubles.dout).sum().item()

    for name, tensor in {"dx": doubles.x, "d_query": doubles.weights["query"]}.items():
        for index in ((0, 0), (3, 2)):
            kept = tensor[index].item()
            tensor[index] = kept + 1e-6
            above = loss()
            tensor[index] = kept - 1e-6
            below = loss()
            tensor[index] = kept
            assert answer[name].value[index].item() == pytest.approx((above - below) / 2e-6, abs=1e-7), name


EVERY_TOKEN = Case(lengths=(8,), cuts=(1, 2, 3, 4, 5, 6, 7), head_dim=4, rotary="default", dtype="bf16")


def test_sums_that_are_kept_in_the_dtype_are_allowed_each_rounding() -> None:
    """Eight equal shares: running sums of 2 to 8 of them, squared, make 203 beside the 8 of the shares themselves."""
    inputs = layer_inputs(EVERY_TOKEN, "cpu")
    strict = layer_answer(EVERY_TOKEN, inputs, Profile(), samples=64)
    lax = layer_answer(EVERY_TOKEN, inputs, Profile(stored_sums=frozenset({"dk"})), samples=64)
    for name, answer in strict.items():
        assert torch.allclose(answer.value, lax[name].value, rtol=1e-12, atol=1e-12), name
    assert torch.equal(strict["d_dense"].variance, lax["d_dense"].variance)
    of_weights = layer_answer(EVERY_TOKEN, inputs, Profile(stored_sums=frozenset({"d_query"})), samples=64)
    assert torch.equal(strict["d_key_value"].variance, of_weights["d_key_value"].variance)
    assert (of_weights["d_query"].variance > strict["d_query"].variance).all()
    assert lax["dk"].variance[0].mean() > 1.2 * strict["dk"].variance[0].mean()
    # The last key gets one share only, and adding nothing rounds nothing.
    assert lax["dk"].variance[-1].mean() < 1.5 * strict["dk"].variance[-1].mean()


@pytest.mark.parametrize(
    ("how", "dtype"), [("float32_angles", "fp32"), ("rotates_in_dtype", "bf16"), ("norms_in_dtype", "bf16")]
)
def test_rotary_and_norms_may_be_rounded_in_more_ways(how: str, dtype: str) -> None:
    norm = "rms" if how == "norms_in_dtype" else "none"
    case = Case(lengths=(100,), head_dim=8, key_norm=norm, rotary="default", dtype=dtype)
    inputs = layer_inputs(case, "cpu")
    strict, lax = (layer_answer(case, inputs, profile, samples=64) for profile in (Profile(), Profile(**{how: True})))
    assert torch.equal(strict["k"].value, lax["k"].value)
    assert lax["k"].variance.mean() > 1.2 * strict["k"].variance.mean()
    # Values are neither rotated nor normed.
    assert torch.allclose(strict["v"].variance, lax["v"].variance, rtol=0.5)
