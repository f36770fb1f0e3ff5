"""Known answers of many documents at once: silent on correct kernels, exact on wrong keys."""

from __future__ import annotations

from random import Random

import pytest
import torch
from devices import needs_cuda

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.known import issues_of
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend, calls_of
from attn_fuzz.batch.judged import Question
from attn_fuzz.batch.packed import confirmed, judge_packed, packed_failure
from attn_fuzz.batch.probes import PROBES
from attn_fuzz.batch.verdicts import COLUMNS
from attn_fuzz.campaign.plan import available_backends, takes_batches
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import run_batch
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import Sweep, draw_case
from attn_fuzz.oracle.known_answer.census import Census
from attn_fuzz.oracle.symptoms import WrongKeys, WrongKeysBackward
from attn_fuzz.reference.answer import KERNEL_TENSORS, Inputs
from attn_fuzz.reference.case import Case

CPU = torch.device("cpu")
KEYS = Question("nan", "keys")


def drawn(backend: Backend, seed: int, documents: int = 40) -> Case:
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    case = draw_case(Random(seed), Sweep((9, 17), seed), backend, domain, documents)
    assert case is not None
    return case


def results_of(case: Case, inputs: Inputs, backend: Backend) -> dict[str, torch.Tensor]:
    return run_batch(BatchTensors(CallBatch.of_one(case), inputs, CPU), backend, "nan").results


def long_documents(seed: int) -> Case:
    """A call with documents of more keys than the shortest that can be swamped, one of them odd."""
    dtype = ("bf16", "fp16")[seed % 2]
    keys = (40, 3, 33, 0, 700, 64)
    return Case(
        level="kernel", lengths=(4, 3, 9, 2, 2, 0), key_lengths=keys, head_dim=8, heads=2, dtype=dtype, seed=seed
    )


def probed_everywhere() -> Case:
    """A call that every probe has inputs for: long enough to be swamped, and with codes for all of its keys."""
    return long_documents(0).replace(key_lengths=(40, 3, 33, 0, 256, 64))


@pytest.mark.parametrize("name", PROBES)
def test_there_is_a_call_that_every_probe_has_inputs_for(name: str) -> None:
    assert PROBES[name](probed_everywhere(), CPU, registry.load("loop").kernel.profile) is not None


def test_there_is_no_swamping_without_long_documents() -> None:
    for case in (long_documents(0).replace(key_lengths=(31,) * 6), long_documents(0).replace(dtype="fp32")):
        assert PROBES["swamping"](case, CPU, registry.load("loop").kernel.profile) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("seed", range(3))
def test_probes_are_silent_on_correct_results_and_look_at_what_they_say(name: str, seed: int) -> None:
    backend = registry.load("loop")
    case = long_documents(seed) if name == "swamping" else drawn(backend, seed).replace(softcap=0.0)
    probe = PROBES[name](case, CPU, backend.kernel.profile)
    assert probe is not None
    results = results_of(case, probe.inputs, backend)
    assert not (probe.deviations(results) > 10).any()
    for column, result in enumerate(KERNEL_TENSORS):
        was = results[result]
        spoilt = probe.deviations(
            {**results, result: torch.linspace(-1e4, 1e4, was.numel()).view_as(was).to(was.dtype)}
        )
        assert bool((spoilt > 10).any()) == (result in probe.symptoms)
        assert not (spoilt[:, [place for place in range(5) if place != column]] > 10).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.kernel_names())
def test_correct_backends_pass(name: str) -> None:
    backend = registry.load(name)
    if backend.kernel.why_unavailable("cpu") is not None:
        pytest.skip("not on this machine")
    # One of them takes ten times as long as any other.
    seeds, documents = (2, 15) if name == "sdpa_nested_math" else (4, 40)
    for probe in PROBES:
        for seed in range(seeds):
            assert packed_failure(drawn(backend, seed, documents), backend, CPU, Question("nan", probe)) is None


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", [n for n in available_backends("cuda") if takes_batches(n, ("kernel",))])
def test_they_pass_on_a_gpu(name: str) -> None:
    backend, device = registry.load(name), torch.device("cuda")
    capabilities = backend.kernel.capabilities_on("cuda")
    case = draw_case(Random(2), Sweep((64, 128), 2), backend, Domain.of(capabilities, "cuda"), 40)
    assert case is not None
    for probe in PROBES:
        if (failure := packed_failure(case, backend, device, Question("nan", probe))) is not None:
            assert issues_of(name, "cuda", case, calls_of(case)), failure.message


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", PROBES)
def test_a_gpu_makes_the_same_inputs(name: str) -> None:
    case = probed_everywhere()
    profile = registry.load("loop").kernel.profile
    there, here = (PROBES[name](case, torch.device(device), profile) for device in ("cuda", "cpu"))
    assert there is not None
    assert here is not None
    for tensor in ("q", "k", "v", "dout"):
        assert torch.equal(getattr(there.inputs, tensor).cpu(), getattr(here.inputs, tensor)), tensor


def test_one_wrong_key_in_one_size_is_seen_and_named() -> None:
    backend = registry.load("trigger:6,13,key:loop")
    lengths, keys = (3, 6, 0, 9, 6) * 40, (3, 12, 4, 17, 6) * 40
    case = Case(level="kernel", lengths=(*lengths, 6), key_lengths=(*keys, 13), head_dim=16, dtype="bf16", causal=False)
    found = packed_failure(case, backend, CPU, KEYS)
    assert found is not None
    assert found.symptom is WrongKeys
    assert found.documents == (200,)
    assert "6 queries, 13 keys" in found.message


@pytest.mark.parametrize("name", KERNEL_TENSORS)
def test_each_result_is_looked_at(name: str) -> None:
    backend = registry.load("loop")
    case = Case(level="kernel", lengths=(5, 3, 7), key_lengths=(5, 6, 7), head_dim=4, heads=2, dtype="bf16", seed=1)
    census = Census.of(case, CPU, backend.kernel.profile)
    probe = PROBES["keys"](case, CPU, backend.kernel.profile)
    assert probe is not None
    results = results_of(case, probe.inputs, backend)
    assert not probe.deviations(results).any()
    # The second document's last row, or last key: of documents with a gradient in one row only, most are silent.
    silent = int(census.row[1] == 2)
    results[name][{"dq": 7 - silent}.get(name, 10 if name in ("dk", "dv") else 7)] += 1.0
    wrong = probe.deviations(results)
    assert wrong.nonzero().tolist() == [[1, KERNEL_TENSORS.index(name)]]


def test_no_second_seed_need_agree() -> None:
    case = Case(level="kernel", lengths=(4,), key_lengths=(9,), head_dim=4)
    backend = registry.load("fault:M18")
    judged = judge_packed(case, backend, CPU, KEYS)
    # What the budgets say is taken out.
    judged.z[:, : len(COLUMNS)] = 0.0
    found = confirmed(judged, lambda other: pytest.fail("it was run again"))
    assert found is not None
    assert "the probe 'keys'" in found.message
    right = judge_packed(Case(level="kernel", lengths=(4,), head_dim=4), backend, CPU, KEYS)
    assert not right.wrong().any()


def test_what_a_probe_measures_is_seen_under_two_value_seeds() -> None:
    found: list[int] = []

    class Forgetful(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            attended = super().attend(q, k, v, metadata, options)
            found.append(len(q))
            return attended._replace(out=torch.cat([attended.out[:1].detach(), attended.out[1:]]))

    case = Case(level="kernel", lengths=(5, 3, 7), key_lengths=(5, 6, 7), head_dim=4, heads=2, dtype="bf16")
    failure = packed_failure(case, Backend("forgetful", Forgetful()), CPU, Question("nan", "every row"))
    assert failure is not None
    assert failure.symptom is WrongKeysBackward
    assert failure.documents == (0,)
    assert "the probe 'every row'" in failure.message
    # The drawn values and the probe, twice.
    assert len(found) == 4


def test_a_probe_without_inputs_asks_nothing() -> None:
    short = Case(level="kernel", lengths=(4,), head_dim=4)
    judged = judge_packed(short, registry.load("loop"), CPU, Question("nan", "swamping"))
    assert not judged.symptoms
    assert not judged.z[:, len(COLUMNS) :].any()
