"""The budget against simulated roundings, in cases small enough to count them all; its scaling laws; exact zeros."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch

from attn_fuzz.backends.registry import load
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference import attention, terms
from attn_fuzz.reference.budget import Variances, attention_variances, degrees_of_freedom
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.profile import ACCUMULATION, SMALLEST_NORMAL, SUBNORMAL_SPACING, UNIT_ROUNDOFF, Profile
from attn_fuzz.reference.rounding import flush_variance, rounding_variance, stored_ds_variance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("out", "lse", "dq", "dk", "dv")
SCALE = 0.5


class Document(NamedTuple):
    """Tensors ``[heads, rows, channels]`` of one document, float64 and exact in their dtype."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    mask: torch.Tensor


def document(dtype: str, seed: int = 0, heads: int = 2, queries: int = 6, keys: int = 9, channels: int = 8) -> Document:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(heads, rows, channels, generator=generator, dtype=torch.float64).to(DTYPES[dtype]).double()

    return Document(
        normal(queries), normal(keys), normal(keys), normal(queries), attention.allowed_keys(queries, keys, (-1, 0))
    )


def budget(
    d: Document, dtype: str, *, scale: float = SCALE, softcap: float = 0.0, group: int = 1, **profile: float
) -> Variances:
    result = attention.forward(d.q, d.k, d.v, d.mask, scale, softcap)
    how = Computation(scale=scale, softcap=softcap, dtype=dtype, profile=Profile(**profile))  # type: ignore[arg-type]
    return attention_variances(terms.Document(d.q, d.k, d.v, d.dout), result, how, group=group)


# One rounding.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 300.0])
def test_the_rounding_of_normal_numbers(dtype: str, magnitude: float) -> None:
    """Mantissas as products have them, spread as 1 / x."""
    generator = torch.Generator().manual_seed(1)
    x = magnitude * 2 ** torch.rand(200_000, generator=generator, dtype=torch.float64)
    error = x.to(DTYPES[dtype]).double() - x
    assert (error.square() / rounding_variance(x, dtype)).mean().item() == pytest.approx(1.0, rel=0.05)
    assert torch.equal(rounding_variance(x, dtype), rounding_variance(-x, dtype))


def test_the_rounding_of_subnormal_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    x = SMALLEST_NORMAL["fp16"] * torch.rand(200_000, generator=generator, dtype=torch.float64)
    error = x.half().double() - x
    assert error.square().mean().item() == pytest.approx(rounding_variance(x, "fp16")[0].item(), rel=0.02)


def test_float32_products_may_be_made_of_two_tf32_parts_the_lesser_flushed() -> None:
    """As tensor cores take them; where the lesser part is a normal number, nothing of this kind is allowed."""
    generator = torch.Generator().manual_seed(1)
    for exponent in (-126, -120, -116, -112, -105, -90):
        x = (2.0**exponent * (1 + torch.rand(100_000, generator=generator))).float()
        # The 13 lowest bits do not fit into TF32.
        greater = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
        lesser = x - greater
        kept = torch.where(lesser.abs() < SMALLEST_NORMAL["fp32"], 0.0, lesser)
        error = greater.double() + kept.double() - x.double()
        assert (error.abs() / rounding_variance(x.double(), "fp32").sqrt()).max().item() < 2.0
    ordinary = torch.tensor([2.0**-95], dtype=torch.float64)
    beside = rounding_variance(ordinary, "bf16").item() * 2.0**-32
    assert rounding_variance(ordinary, "fp32").item() == pytest.approx(beside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_is_stored_exactly(dtype: str) -> None:
    assert rounding_variance(torch.zeros(3, dtype=torch.float64), dtype).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_are_those_of_the_dtype(dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype])
    assert UNIT_ROUNDOFF[dtype] == info.eps / 2
    assert SMALLEST_NORMAL[dtype] == info.smallest_normal
    assert SUBNORMAL_SPACING["fp16"] == 2.0**-24


def test_only_the_smallest_probabilities_may_vanish() -> None:
    p = torch.tensor([0.0, 1e-39, 1e-38, 1e-37, 0.5], dtype=torch.float64)
    assert (flush_variance(p) > 0).tolist() == [False, True, True, False, False]


def test_a_scaled_ds_keeps_fewer_digits_where_it_is_subnormal() -> None:
    ds = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    plain, scaled = rounding_variance(ds, "fp16"), stored_ds_variance(ds, 2.0**-6, 0.0, "fp16")
    assert scaled[0] == plain[0]
    assert scaled[1] > 100 * plain[1]


# All of them, against arithmetic that rounds where a kernel does.


def stored_like_a_kernel(d: Document, dtype: str) -> dict[str, torch.Tensor]:
    """Attention with P, O, dS and the gradients rounded to the dtype, as FlashAttention does; all else exact."""

    def store(x: torch.Tensor) -> torch.Tensor:
        return x.to(DTYPES[dtype]).double()

    p = attention.forward(d.q, d.k, d.v, d.mask, SCALE).probabilities
    out = store(store(p) @ d.v)
    ds = store(p * (d.dout @ d.v.mT - (d.dout * out).sum(-1, keepdim=True)))
    return {
        "out": out,
        "dq": store(SCALE * (ds @ d.k)),
        "dk": store(SCALE * (ds.mT @ d.q)),
        "dv": store(store(p).mT @ d.dout),
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_kernels_roundings_have_the_variance_of_the_budget(dtype: str) -> None:
    """Mean z^2 is 1 where the formulas count every rounding once: half of one too many, or too few, would show."""
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in ("out", "dq", "dk", "dv")}
    for seed in range(40):
        d = document(dtype, seed, queries=12, keys=16)
        exact = attention.forward(d.q, d.k, d.v, d.mask, SCALE)
        right = {"out": exact.out, **attention.backward(d.q, d.k, d.v, d.dout, SCALE, exact)._asdict()}
        allowed, got = budget(d, dtype), stored_like_a_kernel(d, dtype)
        for name, found in squares.items():
            found.append(((got[name] - right[name]).square() / getattr(allowed, name)).flatten())
    for name, found in squares.items():
        z2 = torch.cat(found)
        assert 0.85 < z2.nanmean().item() < 1.15, name
        assert z2.nan_to_num().max() < 8**2, name


def test_noise_in_scores_and_sums_has_the_variance_of_the_budget() -> None:
    """float32 accumulation, drawn instead of rounded: what a score's error does to its row, first order and all."""
    d, draws = document("fp32", heads=1, queries=3, keys=5, channels=4), 20_000
    generator = torch.Generator().manual_seed(2)

    def noise(variance: torch.Tensor) -> torch.Tensor:
        return torch.randn(draws, *variance.shape, generator=generator, dtype=torch.float64) * variance.sqrt()

    scores = SCALE * (d.q @ d.k.mT)
    variance = SCALE**2 * (d.q.square() @ d.k.square().mT) + 1 + scores.square() / 16
    p, lse = attention.softmax_rows(scores + noise(ACCUMULATION**2 * variance), d.mask)
    exact_p, exact_lse = attention.softmax_rows(scores, d.mask)
    stored = p + noise(rounding_variance(exact_p, "fp32"))
    exact = exact_p @ d.v
    out = stored @ d.v + noise(ACCUMULATION**2 * (exact_p @ d.v.square())) + noise(rounding_variance(exact, "fp32"))
    allowed = budget(d, "fp32")
    assert torch.allclose((out - exact).square().mean(0), allowed.out, rtol=0.1)
    lse = lse + noise(ACCUMULATION**2 * (1 + exact_lse.square()))
    assert torch.allclose((lse - exact_lse).square().mean(0), allowed.lse, rtol=0.1)


# Laws.


def ratios(name: str, after: Variances, before: Variances) -> torch.Tensor:
    return getattr(after, name) / getattr(before, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("changed", "factors"),
    [
        ("v", {"out": 4, "lse": 1, "dq": 4, "dk": 4, "dv": 1}),
        ("dout", {"out": 1, "lse": 1, "dq": 4, "dk": 4, "dv": 4}),
    ],
)
def test_twice_the_values_are_four_times_the_variance(dtype: str, changed: str, factors: dict[str, int]) -> None:
    d = document(dtype)
    before = budget(d, dtype)
    after = budget(d._replace(**{changed: 2 * getattr(d, changed)}), dtype)
    for name, factor in factors.items():
        assert torch.allclose(ratios(name, after, before), torch.tensor(float(factor), dtype=torch.float64)), name


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_an_order_of_keys_is_only_an_order(softcap: float) -> None:
    d = document("bf16")._replace(mask=torch.ones(6, 9, dtype=torch.bool))
    order = torch.tensor([3, 1, 4, 0, 8, 5, 7, 2, 6])
    turned = budget(d._replace(k=d.k[:, order], v=d.v[:, order]), "bf16", softcap=softcap)
    before = budget(d, "bf16", softcap=softcap)
    for name in NAMES:
        expected = getattr(before, name)
        assert torch.allclose(getattr(turned, name), expected[:, order] if name in ("dk", "dv") else expected), name


def test_fewer_bits_are_more_variance() -> None:
    d = document("bf16")
    fp32, fp16, bf16 = (budget(d, dtype) for dtype in ("fp32", "fp16", "bf16"))
    for name in ("out", "dq", "dk", "dv"):
        assert (ratios(name, fp16, fp32) > 1).all()
        assert (ratios(name, bf16, fp16) > 1).all()
        # With bits to spare for float32's own errors.
        assert ratios(name, bf16, fp16).median().item() == pytest.approx(64, rel=0.05), name


def test_documents_beside_one_another_do_not_matter() -> None:
    """Leading dimensions broadcast: a batch of documents has the budgets of each."""
    first, second = document("bf16", 1), document("bf16", 2)
    both = Document(*(torch.stack(pair) for pair in zip(first[:4], second[:4], strict=True)), first.mask)
    for name in NAMES:
        expected = torch.stack([getattr(budget(d, "bf16"), name) for d in (first, second)])
        assert torch.allclose(getattr(budget(both, "bf16"), name), expected), name


ROUNDED_MORE: dict[str, set[str]] = {
    "scales_inputs": {"out", "lse", "dq", "dk", "dv"},
    "rounds_scores": {"out", "lse", "dq", "dk", "dv"},
    "scales_gradients": {"dq", "dk"},
    "rounds_dp": {"dq", "dk"},
    "stores_probabilities": {"dq", "dk"},
    "stores_products": {"dq", "dk"},
    # Of bf16 nothing that counts is subnormal.
    "may_store_products": set(),
    # Nothing without a gradient of the LSE (tests/test_lse_gradient.py).
    "splits_ds": set(),
    "expands_kv": {"dk", "dv"},
    "normalises_by_lse": {"out", "dq", "dk"},
    "delta_from_probabilities": {"dq", "dk"},
    "stores_partial_sums": {"dq", "dk", "dv"},
    # Around the kernel, not in it (tests/test_reference.py).
    "norms_in_dtype": set(),
    "rotates_in_dtype": set(),
    "float32_angles": set(),
}


def test_every_rounding_of_a_profile_is_listed() -> None:
    flags = {field.name for field in dataclasses.fields(Profile) if field.default is False}
    assert flags == set(ROUNDED_MORE)


@pytest.mark.parametrize("flag", ROUNDED_MORE)
def test_one_rounding_more_is_more_variance_where_it_enters(flag: str) -> None:
    d = document("bf16", heads=4)
    before = budget(d, "bf16", group=2)
    after = budget(d, "bf16", group=2, **{flag: True})
    larger = {name for name in NAMES if (getattr(after, name) > getattr(before, name) * (1 + 1e-12)).any()}
    assert larger == ROUNDED_MORE[flag]
    assert all((getattr(after, name) >= getattr(before, name)).all() for name in NAMES)


# Roundings that agree.


def unfused_dq(d: Document, *, by_product: bool, stores_p: bool) -> torch.Tensor:
    """dQ as a composition of half precision operations has it, its sums taken without error."""
    scores = (SCALE * (d.q @ d.k.transpose(-1, -2))).half().double().masked_fill(~d.mask, -torch.inf)
    p = scores.softmax(-1)
    p = p.half().double() if stores_p else p
    dp = (d.dout @ d.v.transpose(-1, -2)).half().double()
    products = p * dp
    if by_product:
        # As the backward of torch's softmax does on CUDA.
        products = products.half().double()
    ds = (products - p * products.sum(-1, keepdim=True)).half().double()
    return (SCALE * (ds @ d.k)).half().double()


def worst(d: Document, *, by_product: bool, stores_p: bool = True, **profile: float) -> float:
    """The largest z of that dQ."""
    unfused = dict.fromkeys(("rounds_scores", "rounds_dp", "delta_from_probabilities"), True)
    profile = {**profile, "stores_probabilities": stores_p}
    allowed = budget(d, "fp16", **unfused, **profile)
    error = unfused_dq(d, by_product=by_product, stores_p=stores_p) - allowed.gradients.dq
    return (error.abs() / allowed.dq.sqrt()).max().item()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [2059, 8195])
def test_products_that_are_stored_round_alike(keys: int) -> None:
    """Subnormal dS of one channel: what is left to round of them goes with the scores, and so with the keys."""
    documents = [document("fp16", seed, heads=8, queries=3, keys=keys, channels=1) for seed in range(8)]
    assert max(worst(d, by_product=True) for d in documents) > 10
    assert max(worst(d, by_product=True, stores_products=True) for d in documents) < 7
    assert max(worst(d, by_product=True, may_store_products=True) for d in documents) < 8
    # Nothing of the kind without them.
    assert max(worst(d, by_product=False) for d in documents) < 5


def test_what_may_be_stored_costs_nothing_where_products_are_normal() -> None:
    d = document("fp16", 1, heads=2, queries=5, keys=64, channels=8)
    scores = (SCALE * (d.q @ d.k.transpose(-1, -2))).masked_fill(~d.mask, -torch.inf)
    subnormal = ((scores.softmax(-1) * (d.dout @ d.v.transpose(-1, -2))).abs() < 2.0**-13) & d.mask
    assert subnormal.any()
    assert not subnormal.any(-1).all()
    before, after = (budget(d, "fp16", rounds_dp=True, may_store_products=may) for may in (False, True))
    assert torch.equal((after.dq > before.dq).any(-1), subnormal.any(-1))


@pytest.mark.slow
@pytest.mark.parametrize("stores_p", [True, False])
def test_a_row_of_nearly_equal_weights_rounds_alike(stores_p: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many keys as make weights of about 2^-13: times a stored dP, those of just that much are on dS's grid."""
    close = []
    for seed in range(8):
        d = document("fp16", seed, heads=8, queries=3, keys=8195, channels=1)
        if stores_p:
            d = d._replace(q=(d.q / 2048).half().double())
        else:
            # Values of the same sign: what is lost of a row's weights does not cancel.
            d = d._replace(q=(d.q / 512).half().double(), v=(2 + d.v / 4).half().double())
        close.append(d)
    assert max(worst(d, by_product=False, stores_p=stores_p) for d in close) < 7
    monkeypatch.setattr("attn_fuzz.reference.rounding._CLOSE", -1)
    assert max(worst(d, by_product=False, stores_p=stores_p) for d in close) > 10


def test_what_is_stored_of_dq_on_the_way_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash attention on CPUs, over keys that it takes in 17 blocks."""
    backend = load("sdpa_dense_flash")
    case = Case(level="kernel", lengths=(2, 3), key_lengths=(8195, 3), heads=4, kv_heads=4, head_dim=8, dtype="bf16")
    cases = [case.replace(causal=False, seed=seed) for seed in (3, 8)]
    assert all(examine(case, backend, "cpu", probes=()).worst_z["dq"] < 5 for case in cases)
    monkeypatch.setattr("attn_fuzz.reference.sums.PARTIAL_SUM_KEYS", 1 << 20)
    assert all(examine(case, backend, "cpu", probes=()).worst_z["dq"] > 5 for case in cases)


# Exact zeros: where the variance is 0 nothing but the value will do.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("zero", "exact"),
    [("v", ("out", "dq", "dk")), ("dout", ("dq", "dk", "dv")), ("q", ("dk",)), ("k", ("dq",))],
)
def test_what_must_be_zero_has_no_budget(dtype: str, zero: str, exact: tuple[str, ...]) -> None:
    d = document(dtype)
    allowed = budget(d._replace(**{zero: torch.zeros_like(getattr(d, zero))}), dtype)
    for name in NAMES:
        assert (getattr(allowed, name) == 0).all() == (name in exact), name


def test_keys_and_rows_outside_the_mask_have_no_budget() -> None:
    d = document("bf16", queries=9, keys=6)
    allowed = budget(d, "bf16")
    assert (allowed.out[:, :3] == 0).all()
    assert (allowed.dq[:, :3] == 0).all()
    assert (allowed.out[:, 3:] > 0).all()
    narrow = budget(document("bf16")._replace(mask=attention.allowed_keys(6, 9, (1, 0))), "bf16")
    assert (narrow.dk[:, :2] == 0).all()
    assert (narrow.dv[:, :2] == 0).all()
    assert (narrow.dv[:, 2:] > 0).all()


# Degrees of freedom.


@pytest.mark.parametrize(
    ("sources", "rounding", "degrees"), [([1.0], 0.0, 8 / 9), ([0.25] * 4, 0.0, 8 / 3), ([0.0], 1 / 8, 4.0)]
)
def test_independent_errors_of_a_row(sources: list[float], rounding: float, degrees: float) -> None:
    """1 / (1 / channels + concentration): one source, four equal ones, and nothing but the channels' own."""
    squares = torch.tensor([sum(s**2 for s in sources)], dtype=torch.float64)
    channels = torch.full((1, 8), rounding, dtype=torch.float64)
    total = torch.tensor([sum(sources) + 8 * rounding], dtype=torch.float64)
    assert degrees_of_freedom(total, squares, channels).item() == pytest.approx(degrees)


def test_degrees_lie_between_one_source_and_all_channels() -> None:
    d = document("bf16", heads=4)
    for name, degrees in budget(d, "bf16", group=2).degrees.items():
        assert degrees.shape == getattr(budget(d, "bf16", group=2), name).shape[:-1]
        assert (degrees > 0.88).all()
        assert (degrees <= 8).all()
