"""Kernels that say that they have a forward only, as most of serving do: ``capabilities = {"backward": False}``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commandline import Run

from attn_fuzz.backends import registry
from attn_fuzz.batch.judge import judge, schedule_on
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import NotIsolated, WrongLse, WrongOutput
from attn_fuzz.reference.case import Case

CPU = torch.device("cpu")
CASE = Case(level="kernel", lengths=(3, 0, 5), key_lengths=(7, 2, 5), heads=4, kv_heads=2, head_dim=8)
LAYER = Case(lengths=(5, 3), cuts=(2,), heads=2, head_dim=8, hidden=8)
KERNEL = """
import torch


@torch.no_grad()
def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False):
    out, lse = q.new_zeros(len(q), q.shape[1], v.shape[2]), q.new_full((q.shape[1], len(q)), -torch.inf).float()
    group = q.shape[1] // k.shape[1]
    for qb, qe, kb, ke in zip(*(x.tolist() for s in (cu_seqlens_q, cu_seqlens_k) for x in (s[:-1], s[1:]))):
        if qe == qb or ke == kb:
            continue
        keys, values = (x[kb:ke].repeat_interleave(group, 1).transpose(0, 1).float() for x in (k, v))
        scores = softmax_scale * q[qb:qe].transpose(0, 1).float() @ keys.mT
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(DIAGONAL + ke - kb - (qe - qb))
            scores = scores.masked_fill(hidden, -torch.inf)
        sums = scores.logsumexp(-1)
        weights = (scores - sums[..., None]).exp().nan_to_num(0.0)
        out[qb:qe] = (weights @ values).transpose(0, 1).to(q.dtype)
        lse[:, qb:qe] = LSE * sums
    return out, lse


kernel.capabilities = CAPABILITIES
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "kernel.py"


def named(path: Path, *, diagonal: int = 1, lse: float = 1.0, capabilities: str = '{"backward": False}') -> str:
    """A kernel that is right, or has a mask or an LSE of its own."""
    values = {"DIAGONAL": diagonal, "LSE": lse, "CAPABILITIES": capabilities}
    text = KERNEL
    for name, value in values.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return f"{path}:kernel"


def test_a_forward_is_judged_and_no_gradient(written: Path) -> None:
    backend = registry.load(named(written))
    verdict = examine(CASE, backend, "cpu")
    assert verdict.symptoms == ()
    assert {*verdict.worst_z} == {"out", "lse", "out-rows"}
    layer = examine(LAYER, backend, "cpu")
    assert layer.symptoms == ()
    assert not [name for name in layer.worst_z if name.startswith("d")]


def test_what_is_wrong_in_a_forward_is_found(written: Path) -> None:
    assert isinstance(examine(CASE, registry.load(named(written, diagonal=2)), "cpu").first, (WrongOutput, NotIsolated))
    wrong = examine(CASE, registry.load(named(written.with_name("lse.py"), lse=1.5)), "cpu")
    assert isinstance(wrong.first, WrongLse)


@pytest.mark.parametrize("diagonal", [1, 2])
def test_batches_ask_all_that_they_ask_of_forwards(diagonal: int, written: Path) -> None:
    backend = registry.load(named(written, diagonal=diagonal))
    batch = CallBatch(CASE.replace(lengths=(3, 0, 5, 4), key_lengths=(7, 2, 5, 4)), (1, 3, 4))
    failing = {question.asked: judge(batch, backend, CPU, question).failing() for question in schedule_on("cpu")}
    assert len(failing) > 10
    assert all(bool(calls) == (diagonal == 2) for calls in failing.values()), failing


def test_one_that_does_not_say_so_is_told_how_to(written: Path, attn_fuzz: Run) -> None:
    silent = attn_fuzz("check", named(written, capabilities="{}"), "--seconds", "1", "--device", "cpu")
    assert silent.status == 2
    assert "or declare that it has a forward only by its attribute capabilities = {'backward': False}" in silent.err


@pytest.mark.slow
def test_it_is_fuzzed_like_any_other(written: Path, attn_fuzz: Run) -> None:
    arguments = ("--cases", "60", "--device", "cpu", "--workers", "1", "--json")
    done = attn_fuzz("check", named(written), *arguments)
    assert done.status == 0, done.err
    (told,) = done.json["backends"].values()
    assert told["cases"] >= 60
    assert {key.split()[-1] for key in told["worst_z"]} <= {"out", "lse", "out-rows", "k", "v", "k-rows", "v-rows"}
    found = attn_fuzz("check", named(written.with_name("wrong.py"), diagonal=2), *arguments)
    assert found.status == 1
