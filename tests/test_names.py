"""The first word of a finding is right: it is where people begin to look."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles import double

from attn_fuzz.backends import registry
from attn_fuzz.backends.loop import Call, Document, Loop
from attn_fuzz.execution.poison import poisoned
from attn_fuzz.oracle.checks import PROBES
from attn_fuzz.oracle.checks.exact import rows_counted, uniform_keys
from attn_fuzz.oracle.examine import Verdict, examine
from attn_fuzz.oracle.garbage import kernel_garbage, layer_garbage
from attn_fuzz.oracle.symptoms import MissingResult, PoisonLeaked, WrongGradQ, WrongGradV, WrongKeys, WrongOutput
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import VALUES, Case
from attn_fuzz.reference.layer import layer_inputs

CPU = torch.device("cpu")

DENSE = """
import torch

def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False):
    scale = softmax_scale or q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    document = lambda cu, n: torch.searchsorted(cu, torch.arange(n), right=True)
    own_q, own_k = document(cu_seqlens_q, len(q)), document(cu_seqlens_k, len(k))
    seen = own_q[:, None] == own_k[None]
    if causal:
        behind_q = cu_seqlens_q[own_q.clamp_max(len(cu_seqlens_q) - 1)][:, None] - torch.arange(len(q))[:, None]
        behind_k = cu_seqlens_k[own_k.clamp_max(len(cu_seqlens_k) - 1)][None] - torch.arange(len(k))[None]
        seen = seen & (behind_k >= behind_q)
    MASKED
"""

REPAIRED_BEHIND = """
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    p = (scores + torch.zeros_like(scores).masked_fill(~seen, -torch.inf)).softmax(-1)
    p = torch.where(seen.any(-1, keepdim=True), p, 0.0)
    return torch.einsum("hqk,khd->qhd", p.to(v.dtype).float(), v.float()).to(q.dtype)
"""
"""Rows without keys are repaired behind the softmax: right forward, and NaN in the backward, which is arithmetic."""

HALF_SCORES = """
    scores = torch.einsum("qhd,khd->hqk", q, k)
    p = (scores * scale).masked_fill(~seen, -torch.inf)
    p = torch.where(seen.any(-1, keepdim=True), p, 0.0).float().softmax(-1)
    p = torch.where(seen, p, 0.0).to(v.dtype)
    return torch.einsum("hqk,khd->qhd", p, v)
"""
"""Scores, and in the backward dP, in the storage dtype, masked afterwards: right, as long as they do not overflow."""


def user(folder: Path, body: str) -> registry.Backend:
    """A user's kernel over the whole pack with an explicit mask."""
    path = folder / "dense.py"
    path.write_text(DENSE.replace("    MASKED\n", body))
    return registry.load(f"{path}:kernel")


def verdict(backend: registry.Backend, case: Case) -> Verdict:
    return examine(case, backend, CPU)


BLIND = Case(level="kernel", lengths=(3, 2), key_lengths=(1, 2), causal=True, head_dim=8)


def test_nan_of_arithmetic_is_not_called_unwritten_memory(tmp_path: Path) -> None:
    found = verdict(user(tmp_path, REPAIRED_BEHIND), BLIND)
    assert found.symptoms
    assert PoisonLeaked not in {type(symptom) for symptom in found.symptoms}
    assert any("it comes from arithmetic" in symptom.message for symptom in found.symptoms)
    assert any(symptom.nan for symptom in found.symptoms)


class Unwritten(Loop):
    """dV of the last key is left as it was allocated."""

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "dv" and rows.stop == len(result):
            result[rows.start : rows.stop - 1] = value[:, :-1].transpose(0, 1).to(result.dtype)
        else:
            super().write(result, rows, value, name)


class UnwrittenOverflow(Loop):
    """Adds differences of what it never wrote, multiplied until large contents are infinite, and zeros are not."""

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(call, q, k, v)
        never = torch.empty(1000, dtype=torch.float32)[0] * 3e38
        return out + (never - never).to(out.dtype), lse


def test_zeros_are_what_unwritten_memory_holds_when_asked_for() -> None:
    with poisoned("zero", CPU):
        for size in (3, 1000, 100_000):
            used = torch.ones(size)
            del used
            assert not torch.empty(size).any()


@pytest.mark.parametrize("loop", [Unwritten, UnwrittenOverflow])
def test_nan_of_unwritten_memory_is(loop: type[Loop]) -> None:
    found = verdict(double(loop()), BLIND.replace(key_lengths=(3, 2)))
    assert type(found.first) is PoisonLeaked
    assert "number" in str(found.first)


class RoundedLse(Loop):
    """The backward reads an LSE that was stored in bf16."""

    def saved_lse(self, call: Call, lse: torch.Tensor, document: Document) -> torch.Tensor:
        return super().saved_lse(call, lse, document).bfloat16().float()


class HeavyRow(Loop):
    """The output of every row is a quarter too large."""

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().weighted(call, document, probabilities, v) * 1.25


class DropsKey(Loop):
    """The last key of a document does not take part."""

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        mask = super().mask(call, document).clone()
        mask[..., -1:] = False
        return mask


def names(loop: Loop, case: Case, probe: object = None) -> set[str]:
    """Names of what a probe, or both, accuse a loop of."""
    probes = [each for each in PROBES if each is probe or (probe is None and each in (uniform_keys, rows_counted))]
    trial = Trial(case, double(loop), CPU)
    return {type(symptom).__name__ for each in probes for symptom in each(trial)}


SEVENTEEN = Case(level="kernel", lengths=(17, 5), heads=2, kv_heads=1, head_dim=16, causal=False, dtype="bf16")


@pytest.mark.parametrize("seed", range(8))
def test_a_rounded_lse_is_no_matter_of_keys(seed: int) -> None:
    found = names(RoundedLse(), SEVENTEEN.replace(seed=seed))
    assert found <= {"WrongGradV", "WrongGradK", "WrongGradQ", "WrongLse"}


def test_a_rounded_lse_is_seen_by_the_probes() -> None:
    found = set().union(*(names(RoundedLse(), SEVENTEEN.replace(seed=seed)) for seed in range(8)))
    assert WrongGradV.__name__ in found


def test_a_common_factor_is_no_matter_of_keys() -> None:
    assert names(HeavyRow(), SEVENTEEN, uniform_keys) <= {WrongOutput.__name__}
    assert WrongOutput.__name__ in set().union(
        *(names(HeavyRow(), SEVENTEEN.replace(seed=seed), uniform_keys) for seed in range(8))
    )


def test_a_dropped_key_is() -> None:
    assert WrongKeys.__name__ in names(DropsKey(), SEVENTEEN, uniform_keys)


class NoNumbers(Loop):
    """dQ is NaN."""

    def dq(self, call: Call, document: Document, ds: torch.Tensor) -> torch.Tensor:
        return super().dq(call, document, ds) * torch.nan


def test_nan_in_any_gradient_says_nothing_about_keys() -> None:
    (symptom,) = uniform_keys(Trial(SEVENTEEN, double(NoNumbers()), CPU))
    assert (type(symptom), symptom.tensor, symptom.nan) == (WrongGradQ, "dq", True)


def test_a_symptom_has_what_came_out_where_and_what_should_have_as_data() -> None:
    census, *_ = uniform_keys(Trial(SEVENTEEN, double(DropsKey()), CPU))
    assert census.element is not None
    place = census.element.place
    assert census.message.startswith(f"{place}: the sum over its {(17, 5)[place.document or 0]} keys is ")
    # The keys that are left have a weight of 1/16 each, or 1/4.
    assert abs(census.element.got - census.element.expected) > 0.01
    found = verdict(double(HeavyRow()), SEVENTEEN)
    assert found.first is not None
    assert found.first.check == "budget"
    element = found.first.element
    assert element is not None
    assert element.got == pytest.approx(1.25 * element.expected, rel=0.02)
    assert found.first.message.startswith(f"{element.place}: got {element.got:.6g}, expected {element.expected:.6g}, ")


class WritesWhenAsked(Loop):
    """Writes to V where a call's queries have one channel only, as those of a census do."""

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results = super().forward(call, q, k, v)
        if not q[..., 1:].any():
            v.detach()[0, 0, 0] = 0.5
        return results


@pytest.mark.parametrize("memory", ["contiguous", "broadcast"])
def test_an_input_overwritten_during_a_probe_is_reported(memory: str) -> None:
    found = verdict(double(WritesWhenAsked()), SEVENTEEN.replace(memory=memory))
    assert "InputsChanged" in {type(symptom).__name__ for symptom in found.symptoms}


SHAPES = {
    "four dimensions": "return out[:, :, None]",
    "heads and channels swapped": "return out.transpose(1, 2)",
    "another dtype": "return out.double()",
    "no LSE beside the output": "return out, None",
    "None": "return None",
}


@pytest.mark.parametrize("level", ["kernel", "layer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_output_of_another_shape_is_a_missing_result_at_every_level(shape: str, level: str, tmp_path: Path) -> None:
    last = REPAIRED_BEHIND.rstrip().rpartition("    return ")
    body = f"{last[0]}    out = {last[2]}\n    {SHAPES[shape]}\n"
    case = Case(level="kernel", lengths=(3,), head_dim=4) if level == "kernel" else Case(lengths=(3,), head_dim=4)
    found = verdict(user(tmp_path, body), case)
    assert type(found.first) is MissingResult, found.symptoms
    assert found.first.tensor == "out"


def test_an_output_beside_its_lse_is_taken(tmp_path: Path) -> None:
    last = REPAIRED_BEHIND.rstrip().rpartition("    return ")
    body = f"{last[0]}    out = {last[2]}\n    return out, scores.masked_fill(~seen, -torch.inf).logsumexp(-1), None\n"
    assert not verdict(user(tmp_path, body), Case(level="kernel", lengths=(3, 2), head_dim=4)).symptoms


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
@pytest.mark.parametrize("head_dim", [8, 128])
@pytest.mark.parametrize("values", VALUES)
def test_garbage_does_not_overflow_what_a_half_precision_kernel_stores(
    head_dim: int, values: str, seed: int, tmp_path: Path
) -> None:
    """Scores and dP in float16, behind a packed mask: 0 times infinity would reach everybody."""
    case = Case(level="kernel", lengths=(1, 1), head_dim=head_dim, dtype="fp16", seed=seed, values=values)
    found = verdict(user(tmp_path, HALF_SCORES), case)
    assert "NotIsolated" not in {type(symptom).__name__ for symptom in found.symptoms}, found.symptoms


def test_garbage_is_as_large_as_it_may_be() -> None:
    case = Case(level="kernel", lengths=(1, 1), head_dim=8, dtype="fp16")
    assert kernel_garbage(case) == -6
    assert kernel_garbage(case.replace(dtype="bf16")) == -96
    assert -6 < kernel_garbage(case.replace(head_dim=256)) <= -1.5
    layer = Case(lengths=(2, 1), head_dim=64, hidden=64, dtype="fp16")
    assert -12 <= layer_garbage(layer, layer_inputs(layer, "cpu")) <= -0.375
    normed = layer.replace(query_norm="rms", key_norm="rms", value_norm="rms")
    assert layer_garbage(normed, layer_inputs(normed, "cpu")) <= layer_garbage(layer, layer_inputs(layer, "cpu"))


class AddsNeighbour(Loop):
    """Every row has a little of the next document's first value."""

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        other = v[-1, :1].float()[:, None] if document.index == 0 else 0.0
        return super().weighted(call, document, probabilities, v) + 1e-3 * other


def test_a_finding_of_isolation_says_what_was_put_where_and_how_far_what_moved() -> None:
    from attn_fuzz.oracle.checks.isolation import documents_apart

    case = Case(level="kernel", lengths=(2, 1), head_dim=8, dtype="fp16", seed=0)
    symptom, *_ = documents_apart(Trial(case, double(AddsNeighbour(), isolates_nonfinite=False), CPU))
    garbage = kernel_garbage(case)
    assert f"({garbage:g} in q, k, v and dout of documents 1)" in symptom.message
    assert "such rows, by up to 0.0" in symptom.message
    assert " from " in symptom.message
