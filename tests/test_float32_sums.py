"""Float32 sums as kernels take them: cut off by tensor cores, or one term after another over all heads of a group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.oracle.deviations import LIMIT, deviations, row_bound
from attn_fuzz.reference import batched, sums, terms, vectorised_scores, vectorised_terms
from attn_fuzz.reference.answer import KERNEL_TENSORS, Expected, kernel_answer, kernel_inputs
from attn_fuzz.reference.case import Case

STEP = 16


def answer(case: Case) -> dict[str, Expected]:
    return kernel_answer(case, kernel_inputs(case, "cpu"), registry.load("torch_efficient").kernel.profile_on("cuda"))


def cut_off_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``[rows, keys]``: 16 products at a time, added to a float32 sum that keeps no bit beyond its 24."""
    total = np.zeros((len(q), len(k)), dtype=np.float32)
    for channel in range(0, q.shape[1], STEP):
        part = (q[:, channel : channel + STEP].double() @ k[:, channel : channel + STEP].double().T).numpy()
        exact = total.astype(np.float64) + part
        near = exact.astype(np.float32)
        larger = np.abs(near.astype(np.float64)) > np.abs(exact)
        total = np.where(larger, np.nextafter(near, np.float32(0)), near)
    return torch.from_numpy(total)


def worst_lse(head_dim: int, keys: int) -> float:
    """The largest z of an LSE whose scores are all that is not exact."""
    case = Case(level="kernel", lengths=(keys,), head_dim=head_dim, dtype="fp16", values="offset", causal=False)
    inputs = kernel_inputs(case, "cpu")
    scores = cut_off_scores(inputs.q[:, 0], inputs.k[:, 0]).double() * case.softmax_scale
    lse = scores.logsumexp(-1)[:, None].float()
    return deviations(case, lse, answer(case)["lse"]).max().item()


@pytest.mark.parametrize("head_dim", [128, 256, 488, 512])
def test_an_lse_of_sums_that_are_cut_off_alike_is_right(head_dim: int) -> None:
    assert max(worst_lse(head_dim, keys) for keys in (52, 400)) < 0.8 * LIMIT


def test_without_that_it_would_be_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sums, terms, vectorised_scores, vectorised_terms):
        monkeypatch.setattr(module, "cut_off", lambda channels: 0.0)
    assert worst_lse(512, 400) > 0.7 * LIMIT > 3 * worst_lse(128, 400)


def test_of_few_channels_nothing_is_allowed_for() -> None:
    assert sums.cut_off(128) == 0.0
    assert 0.0 < sums.cut_off(192) < sums.cut_off(256)


def test_both_references_allow_for_it_alike() -> None:
    case = Case(level="kernel", lengths=(9, 4), heads=2, head_dim=320, dtype="bf16", values="offset", softcap=2.5)
    inputs, profile = kernel_inputs(case, "cpu"), registry.load("flash").kernel.profile_on("cuda")
    one, other = kernel_answer(case, inputs, profile), batched.kernel_answer(case, inputs, profile, degrees=False)
    for name in KERNEL_TENSORS:
        torch.testing.assert_close(one[name].variance, other[name].variance, rtol=1e-9, atol=0.0)


def spread_of_one_sum(group: int, *, allowed: int) -> float:
    """Mean z^2 of dV of a single key, in units of its bound, where rows of all heads are one sum, term after term."""
    rows, channels = 2264, 32
    generator = torch.Generator().manual_seed(3)
    terms_of = torch.randn(rows * group, channels, generator=generator)
    got = torch.from_numpy(np.cumsum(terms_of.numpy(), axis=0, dtype=np.float32)[-1]).double()
    variance = sums.sums_of(rows, 1, registry.load("backup").kernel.profile_on("cpu"), allowed).over_rows
    z2 = (got - terms_of.double().sum(0)).square() / (variance * terms_of.double().square().sum(0))
    return z2.mean().item() / row_bound(torch.tensor(float(channels))).item()


def test_heads_of_a_group_are_rows_of_one_sum() -> None:
    assert spread_of_one_sum(16, allowed=16) < 0.5
    assert spread_of_one_sum(16, allowed=1) > spread_of_one_sum(1, allowed=1)
    assert spread_of_one_sum(16, allowed=1) > 0.5


def test_where_each_head_has_keys_of_its_own_sums_are_as_long_as_the_document() -> None:
    expanded = registry.load("flash").kernel.profile_on("cuda")
    assert expanded.expands_kv
    assert sums.sums_of(500, 1, expanded, 16) == sums.sums_of(500, 1, expanded, 1)._replace(
        **{name: count for name, count in sums.sums_of(500, 1, expanded, 16)._asdict().items() if "atomic" in name}
    )
