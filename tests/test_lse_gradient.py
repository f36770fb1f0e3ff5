"""The LSE's gradient: what is right, how far correct kernels stray from it, and who may leave it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, UnsupportedCase
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend, load
from attn_fuzz.batch.judge import judge
from attn_fuzz.batch.judged import Question
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.drawing import few_cases
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.second_value import of_another_meaning
from attn_fuzz.reference import attention, terms
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.budget import Variances, attention_variances
from attn_fuzz.reference.case import MEMORIES, Case, CaseError
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


# Who gives one.


CASE = Case(level="kernel", lengths=(4, 0, 3), key_lengths=(6, 2, 3), heads=2, head_dim=8, lse_gradient=True)


class Altered(LoopKernel):
    """The loop with something done to what it gives back."""

    def __init__(self, deed: Callable[[Attended], Attended]) -> None:
        self.deed = deed

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        return self.deed(super().attend(q, k, v, metadata, options))


def altered(deed: Callable[[Attended], Attended]) -> Backend:
    return Backend("altered", Altered(deed), levels=("kernel",))


def detached(attended: Attended) -> Attended:
    assert attended.lse is not None
    return attended._replace(lse=attended.lse.detach())


@pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory != "broadcast"])
def test_a_right_kernel_is_clean_wherever_the_gradient_lies(memory: str) -> None:
    found = examine(CASE.replace(memory=memory, capacity=1), load("loop"), "cpu", probes=())
    assert not found.symptoms
    assert found.worst_z["dq"] > 0


@pytest.mark.parametrize(
    ("deed", "said"), [(detached, "not differentiable"), (lambda each: each._replace(lse=None), "returns none")]
)
def test_an_lse_without_a_graph_refuses(deed: Callable[[Attended], Attended], said: str) -> None:
    with pytest.raises(UnsupportedCase, match=f"a gradient for the LSE.*{said}"):
        examine(CASE, altered(deed), "cpu", probes=())
    assert not examine(CASE.replace(lse_gradient=False), altered(deed), "cpu", probes=()).symptoms


def test_a_gradient_that_is_dropped_is_found() -> None:
    def dropped(attended: Attended) -> Attended:
        lse = attended.lse
        assert lse is not None
        return attended._replace(lse=lse.detach() + 0 * attended.out.sum())

    found = examine(CASE, altered(dropped), "cpu", probes=())
    assert {each.tensor for each in found.symptoms if each.check == "budget"} == {"dq", "dk"}


def test_a_backend_that_does_not_take_it_is_not_asked() -> None:
    with pytest.raises(UnsupportedCase, match="a gradient for the LSE"):
        examine(CASE, load("backup"), "cpu")


def test_a_layer_has_none() -> None:
    with pytest.raises(CaseError, match="lse_gradient belongs to kernel cases"):
        Case(lse_gradient=True)


def test_a_batch_has_it_in_every_call() -> None:
    batch = CallBatch(CASE.replace(lengths=(4, 0, 3, 2), key_lengths=(6, 2, 3, 2)), (1, 3, 4))
    assert not judge(batch, load("loop"), torch.device("cpu"), Question("nan", "documents apart")).failing()
    wrong = judge(batch, load("fault:S01"), torch.device("cpu"))
    assert wrong.failing()
    tensors = BatchTensors(batch, kernel_inputs(batch.case, "cpu"), torch.device("cpu"))
    for index in range(3):
        alone, mine = kernel_inputs(batch.call(index), "cpu").dlse, tensors.lse_gradients[index]
        assert alone is not None
        assert mine is not None
        assert torch.equal(mine, alone.T)


def test_it_is_drawn_only_where_it_is_taken() -> None:
    def drawn(capabilities: Capabilities) -> set[bool]:
        found: set[bool] = set()
        domain = Domain.of(capabilities, "cpu")
        few_cases("kernel", domain, 1, lambda case: found.add(case.lse_gradient), 40)
        return found

    assert drawn(LoopKernel.capabilities) == {False, True}
    assert drawn(dataclasses.replace(LoopKernel.capabilities, lse_gradient=None)) == {False}


# The LSE that a user's kernel returns.


KERNEL = """
import torch


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale):
    outs, sums = [], []
    ends = zip(cu_seqlens_q[1:].tolist(), cu_seqlens_k[1:].tolist())
    qb = kb = 0
    for qe, ke in ends:
        keys, values = (x[kb:ke].float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[qb:qe].float(), keys) * softmax_scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
        qb, kb = qe, ke
    out, lse = torch.cat(outs).to(q.dtype), torch.cat(sums, 1)
    return RETURNED


kernel.capabilities = DECLARED
"""
PLAIN: dict[str, Any] = {"queries_without_keys": False, "empty_documents": False, "capacity": False}
USERS = CASE.replace(lengths=(4, 1, 3), causal=False)


def user(tmp_path: Path, returned: str, **declared: Any) -> Backend:
    file = tmp_path / "mine.py"
    file.write_text(KERNEL.replace("RETURNED", returned).replace("DECLARED", repr({**PLAIN, **declared})))
    return load(f"{file}:kernel")


@pytest.mark.parametrize("returned", ["(out, lse)", "(out, lse.T)", "(out, lse.double(), None)", "(out, lse.T.mT)"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_lse_is_judged_without_a_declaration(returned: str, dtype: str, tmp_path: Path) -> None:
    found = examine(USERS.replace(dtype=dtype), user(tmp_path, returned), "cpu")
    assert not found.symptoms
    assert found.worst_z["lse"] > 0


@pytest.mark.parametrize(
    ("returned", "symptom"),
    [
        ("(out, lse * 0)", "WrongLse"),
        ("(out, lse / 0.6931471805599453)", "WrongLse"),
        ("(out, Dropped.apply(lse))", "WrongGradQ"),
        ("(out, lse, lse)", None),
    ],
)
def test_an_lse_that_is_wrong_is_convicted(returned: str, symptom: str | None, tmp_path: Path) -> None:
    first = examine(USERS, user(tmp_path, returned), "cpu", probes=()).first
    assert (None if first is None else type(first).__name__) == symptom


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("(out, lse.detach() * 0)", "what the kernel returns second is taken for the LSE"),
        ("(out, lse.detach() / 0.6931471805599453)", 'adapters.Lse("ht", base="2")'),
        ("(out * 1.5, lse.detach() * 0)", None),
    ],
)
def test_a_finding_says_what_to_declare_of_a_second_value(returned: str, said: str | None, tmp_path: Path) -> None:
    backend = user(tmp_path, returned)
    found = of_another_meaning(backend, examine(USERS.replace(lse_gradient=False), backend, "cpu", probes=()).symptoms)
    assert (found is None) is (said is None)
    assert (said or "") in (found or "")


def test_of_a_declared_lse_it_says_nothing(tmp_path: Path) -> None:
    backend = user(tmp_path, "(out, lse.detach() * 0)", lse=True)
    symptoms = examine(USERS.replace(lse_gradient=False), backend, "cpu", probes=()).symptoms
    assert symptoms
    assert of_another_meaning(backend, symptoms) is None


@pytest.mark.parametrize(
    ("returned", "declared"),
    [("(out, lse * 0)", {"lse": False}), ("(out, (lse * 0).bfloat16())", {}), ("(out, (lse * 0)[None])", {})],
)
def test_what_is_no_lse_is_thrown_away(returned: str, declared: dict[str, Any], tmp_path: Path) -> None:
    backend, case = user(tmp_path, returned, **declared), USERS.replace(lse_gradient=False)
    found = examine(case, backend, "cpu", probes=())
    assert not found.symptoms
    assert "lse" not in found.worst_z
    with pytest.raises(UnsupportedCase, match="a gradient for the LSE, it returns none"):
        examine(USERS, backend, "cpu", probes=())


def test_of_a_square_result_nothing_is_known(tmp_path: Path) -> None:
    """Which of its sides are heads is not told."""
    square = USERS.replace(lengths=(1, 1), key_lengths=(2, 3), lse_gradient=False)
    assert "lse" not in examine(square, user(tmp_path, "(out, lse)"), "cpu", probes=()).worst_z


def test_calls_show_whether_its_gradient_can_be_drawn(tmp_path: Path) -> None:
    for returned, shown in (("(out, lse)", True), ("(out, lse.detach())", None), ("out", None)):
        kernel = user(tmp_path, returned).kernel
        assert kernel.capabilities_on("cpu").lse_gradient is None
        examine(USERS.replace(lse_gradient=False), Backend("mine", kernel, levels=("kernel",)), "cpu", probes=())
        assert kernel.capabilities_on("cpu").lse_gradient is shown
    declared = user(tmp_path, "(out, lse)", lse_gradient=False)
    examine(USERS.replace(lse_gradient=False), declared, "cpu", probes=())
    with pytest.raises(UnsupportedCase, match="does not take a gradient for the LSE"):
        examine(USERS, declared, "cpu")
