"""The LSE's gradient: what is right, how far correct kernels stray from it, and who may leave it out."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.reference import attention, terms
from attn_fuzz.reference.budget import Variances, attention_variances
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.values import DTYPES

SCALE = 0.5


class Drawn:
    """Tensors ``[heads, rows, channels]`` of one causal document with a past, float64 and exact in a dtype."""

    def __init__(self, dtype: str, seed: int, queries: int = 12, keys: int = 16, channels: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype]).double()

        self.q, self.dout = normal(queries, channels), normal(queries, channels)
        self.k, self.v = normal(keys, channels), normal(keys, channels)
        self.dlse, self.dtype = normal(queries), dtype
        self.mask = attention.allowed_keys(queries, keys, (-1, 0))

    def forward(self, softcap: float = 0.0) -> attention.Forward:
        return attention.forward(self.q, self.k, self.v, self.mask, SCALE, softcap)

    def gradients(self, softcap: float = 0.0) -> dict[str, torch.Tensor]:
        result = self.forward(softcap)
        return attention.backward(self.q, self.k, self.v, self.dout, SCALE, result, self.dlse)._asdict()

    def budget(self, **profile: bool) -> Variances:
        how = Computation(scale=SCALE, dtype=self.dtype, profile=Profile(**profile))  # type: ignore[arg-type]
        tensors = terms.Document(self.q, self.k, self.v, self.dout, self.dlse)
        return attention_variances(tensors, self.forward(), how)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(DTYPES[self.dtype]).double()


# What is right.


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_are_those_of_autograd(softcap: float) -> None:
    d = Drawn("fp32", 0)
    leaves = [x.requires_grad_() for x in (d.q, d.k, d.v)]
    result = d.forward(softcap)
    wanted = torch.autograd.grad([result.out, result.lse], leaves, [d.dout, d.dlse])
    for x in leaves:
        x.requires_grad_(False)
    for got, right in zip(d.gradients(softcap).values(), wanted, strict=True):
        assert torch.allclose(got, right, rtol=1e-12, atol=1e-12)


def test_alone_it_moves_no_values() -> None:
    """dV is 0, dQ the mean of the keys by their weights, dK the query by its weights."""
    d = Drawn("fp32", 0)
    d.dout, d.dlse = torch.zeros_like(d.dout), torch.zeros_like(d.dlse)
    d.dlse[1, 3] = 1.0
    p, gradients = d.forward().probabilities, d.gradients()
    assert not gradients["dv"].any()
    assert torch.allclose(gradients["dq"][1, 3], SCALE * (p[1, 3] @ d.k[1]))
    assert torch.allclose(gradients["dk"][1], SCALE * p[1, 3, :, None] * d.q[1, 3])
    assert not gradients["dq"][0].any()
    assert not gradients["dk"][0].any()


# How far correct kernels stray.


def stored_like_a_kernel(d: Drawn, *, split: bool) -> dict[str, torch.Tensor]:
    """The results with every rounding to the dtype that there is, and no other; with ``split``, two ways to dS."""
    p = d.forward().probabilities
    out = d.stored(d.stored(p) @ d.v)
    of_output = d.dout @ d.v.mT - (d.dout * out).sum(-1, keepdim=True)
    if split:
        ds = d.stored(d.stored(p * of_output) + d.stored(p * d.dlse[..., None]))
    else:
        ds = d.stored(p * (of_output + d.dlse[..., None]))
    return {"dq": d.stored(SCALE * (ds @ d.k)), "dk": d.stored(SCALE * (ds.mT @ d.q))}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("split", [False, True])
def test_a_kernels_roundings_have_the_variance_of_the_budget(dtype: str, split: bool) -> None:
    squares: dict[str, list[torch.Tensor]] = {"dq": [], "dk": []}
    for seed in range(40):
        d = Drawn(dtype, seed)
        right, allowed, got = d.gradients(), d.budget(splits_ds=split), stored_like_a_kernel(d, split=split)
        for name, found in squares.items():
            found.append(((got[name] - right[name]).square() / getattr(allowed, name)).flatten())
    for name, found in squares.items():
        z2 = torch.cat(found)
        # Of two parts and their sum, the last rounding is counted twice.
        assert (0.6 if split else 0.85) < z2.nanmean().item() < 1.15, name
        assert z2.nan_to_num().max() < 8**2, name


def test_two_ways_to_ds_have_more_variance_only_where_the_lse_has_a_gradient() -> None:
    d = Drawn("bf16", 1)
    d.dlse[:, ::2] = 0.0
    one, two = d.budget(), d.budget(splits_ds=True)
    assert torch.equal(one.out, two.out)
    assert torch.equal(one.dv, two.dv)
    assert torch.allclose(one.dq[:, ::2], two.dq[:, ::2], rtol=1e-9)
    assert (two.dq[:, 1::2] > one.dq[:, 1::2]).all()
