"""Census, support and needle: silent on a right kernel, and each sees a fault that budgets may miss."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.loop import Call, Document, Loop, attend
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.oracle.checks.accumulation import exact_accumulation
from attn_fuzz.oracle.checks.exact import needle_found, uniform_keys
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.known_answer.accumulation import accumulation_probe
from attn_fuzz.oracle.known_answer.census import Census
from attn_fuzz.oracle.known_answer.needle import Needle
from attn_fuzz.oracle.symptoms import NotExact, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import call_segments
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")
CASE = Case(
    level="kernel", lengths=(3, 0, 40, 2), key_lengths=(3, 4, 64, 5), heads=4, kv_heads=2, head_dim=16, dtype="bf16"
)


class Faulty(Kernel):
    """The loop kernel with one decision changed."""

    name = "faulty"
    capabilities = Capabilities()

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        out, lse = attend(self.loop, q, k, v, metadata, options)
        return Attended(out, lse, "faulty")


class OneKeyLess(Loop):
    """The last row of long documents does not see key 5, in the passes named."""

    def __init__(self, *passes: str) -> None:
        self.passes = passes

    def mask(self, call: Call, document: Document) -> torch.Tensor:
        mask = super().mask(call, document)
        if ("backward" if document.backward else "forward") in self.passes and document.seen > 32:
            mask[-1, 5] = False
        return mask


class HeadsInterleaved(Loop):
    """Query head h reads K/V head h % kv_heads."""

    def expand(self, call: Call, x: torch.Tensor, backward: bool) -> torch.Tensor:
        return x.repeat(call.group, 1, 1)


class NeighbourRow(Loop):
    """Values are those of the next key."""

    def expand(self, call: Call, x: torch.Tensor, backward: bool) -> torch.Tensor:
        return super().expand(call, x.roll(1, 1) if (x.abs() > 1).any() else x, backward)


def symptoms(loop: Loop, case: Case = CASE) -> dict[str, list[Symptom]]:
    trial = Trial(case, Backend("faulty", Faulty(loop)), torch.device("cpu"))
    found = [*uniform_keys(trial), *needle_found(trial)]
    return {check: [s for s in found if s.check == check] for check in ("census", "support", "needle")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (7, -1), (0, -1)])
def test_silent_on_a_right_kernel(dtype: str, causal: bool, window: tuple[int, int]) -> None:
    case = CASE.replace(dtype=dtype, causal=causal, window=window)
    assert not any(symptoms(Loop(), case).values())


def test_census_sees_one_key_of_one_row_missing_in_the_forward() -> None:
    found = symptoms(OneKeyLess("forward"))
    assert found["census"]
    assert "row 39" in str(found["census"][0])


def test_support_sees_one_key_of_one_row_missing_in_the_backward() -> None:
    """The support probe looks at one row per document and seed; some seed looks at the last one."""
    found = [symptoms(OneKeyLess("backward"), CASE.replace(seed=seed)) for seed in range(12)]
    assert not any(f["census"] or f["needle"] for f in found)
    assert any(f["support"] for f in found)


def test_needle_sees_interleaved_heads() -> None:
    assert symptoms(HeadsInterleaved())["needle"]


def test_needle_names_the_key_that_came_out() -> None:
    found = symptoms(NeighbourRow())["needle"]
    assert found
    assert "came out" in str(found[0])


def test_uniform_values_cannot_drift() -> None:
    """Any run of keys sums to at most 2 in magnitude, which is what makes rounding to the integer exact."""
    values = Census.of(CASE, CPU, Profile()).inputs.v.double()
    for segment in call_segments(CASE):
        sums = torch.cat([torch.zeros_like(values[:1]), values[slice(*segment.keys)].cumsum(0)])
        assert (sums[:, None] - sums[None]).abs().max() <= 2


def test_needles_are_told_apart() -> None:
    """Between the picked key and any other lies a logit gap of at least 30."""
    probe = Needle.of(CASE, CPU, Profile())
    assert probe is not None
    q, k = probe.inputs.q.double(), probe.inputs.k.double()
    group = CASE.heads // CASE.kv_heads
    for segment in call_segments(CASE):
        keys = k[slice(*segment.keys)].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->qhk", q[slice(*segment.queries)], keys) * CASE.softmax_scale
        if scores.shape[-1] > 1 and scores.shape[0]:
            best = scores.topk(2, -1).values
            assert (best[..., 0] - best[..., 1]).min() >= 30


def test_no_needle_where_keys_cannot_be_told_apart() -> None:
    assert Needle.of(CASE.replace(head_dim=1), CPU, Profile()) is None
    assert Needle.of(CASE.replace(softcap=5.0), CPU, Profile()) is None


def test_a_call_without_a_single_key_is_judged() -> None:
    """A right kernel is not accused of it, by probes that have nothing to point at."""
    case = Case(level="kernel", lengths=(2,), key_lengths=(0,))
    assert Needle.of(case, CPU, Profile()) is None
    assert examine(case, registry.load("loop"), "cpu").symptoms == ()


def test_float32_sums_of_the_output_projection_are_whole() -> None:
    """Documents of one token: each micro-sequence adds +-w to every element of a row."""
    case = Case(lengths=(1, 1, 1), cuts=(1, 2), heads=2, kv_heads=2, head_dim=4, dtype="bf16", seed=2)
    apart = accumulation_probe(case)
    assert apart is not None
    # All three use the first channel, of either head.
    assert set(apart.exact["d_dense"][[0, 4]].abs().flatten().tolist()) == {129.0 + 130 + 129}
    assert accumulation_probe(case.replace(cuts=())) is None
    straddling = Case(lengths=(4,), cuts=(1, 2, 3), heads=2, head_dim=4, dtype="bf16")
    probe = accumulation_probe(straddling)
    assert probe is not None
    # Rows 0, 1 and 3 have 1, 2 and 4 keys; w is 129 and 130 in turn.
    assert set(probe.exact["d_dense"][0].abs().tolist()) == {129.0 + 2 * 130 + 4 * 130}
    assert not probe.exact["d_dense"][1:].any()
    trial = Trial(straddling, registry.load("loop"), torch.device("cpu"))
    assert list(exact_accumulation(trial)) == []


def test_rounded_sums_of_the_output_projection_are_seen() -> None:
    case = Case(lengths=(4,), cuts=(1, 2, 3), heads=2, head_dim=4, dtype="bf16")
    (symptom,) = exact_accumulation(Trial(case, registry.load("fault:L02"), torch.device("cpu")))
    assert (type(symptom), symptom.tensor) == (NotExact, "d_dense")
    assert "instead of the whole number" in symptom.message
