"""Probes of many documents: the pure probes' numbers, silent on correct kernels, exact on wrong keys."""

from __future__ import annotations

from random import Random

import pytest
import torch
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.known import issues_of
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend, calls_of
from attn_fuzz.reference.answer import KERNEL_TENSORS
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import UNIT_ROUNDOFF

from attn_fuzz.batch.census import keys_probe, wrong_documents
from attn_fuzz.batch.every_row import every_row_inputs
from attn_fuzz.batch.needle import needle_inputs
from attn_fuzz.batch.packed import examine_probe, probe_verdict
from attn_fuzz.batch.packed_call import Call, run
from attn_fuzz.batch.probes import PROBES
from attn_fuzz.batch.swamping import swamped_sums, swamping_inputs
from attn_fuzz.campaign.plan import available_backends, takes_batches
from attn_fuzz.generation.length_sweeps import Sweep, draw_case
from attn_fuzz.generation.strategies import Domain
from attn_fuzz.oracle.known_answer.inputs import every_row_probe, needle_probe, uniform_probe
from attn_fuzz.oracle.known_answer.swamping import sums_of, swamping_probe
from attn_fuzz.oracle.symptoms import WrongKeys, WrongKeysBackward

CPU = torch.device("cpu")


def drawn(backend: Backend, seed: int, documents: int = 40) -> Case:
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    case = draw_case(Random(seed), Sweep((9, 17), seed), backend, domain, documents)
    assert case is not None
    return case


@pytest.mark.parametrize("seed", range(6))
def test_numbers_are_those_of_the_pure_probe(seed: int) -> None:
    case = drawn(registry.load("loop"), seed)
    pure, wide = uniform_probe(case), keys_probe(case, CPU)
    for name in ("q", "k", "v", "dout"):
        assert torch.equal(getattr(pure.inputs, name), getattr(wide.inputs, name)), name
    assert pure.shift == wide.shift
    for document, hot in pure.hot.items():
        assert (hot.row, hot.head, hot.channel) == tuple(
            int(each[document]) for each in (wide.row, wide.head, wide.channel)
        )


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


@pytest.mark.parametrize("seed", range(12))
def test_needles_are_those_of_the_pure_probe(seed: int) -> None:
    case = drawn(registry.load("loop"), seed)
    pure, wide = needle_probe(case), needle_inputs(case, CPU)
    assert (pure is None) == (wide is None)
    if pure is not None and wide is not None:
        assert torch.equal(pure.picked, wide.picked)
        for name in ("q", "k", "v", "dout"):
            assert torch.equal(getattr(pure.inputs, name), getattr(wide.inputs, name)), name


@pytest.mark.parametrize("seed", range(6))
def test_gradients_in_every_row_are_those_of_the_pure_probe(seed: int) -> None:
    case = drawn(registry.load("loop"), seed)
    pure, wide = every_row_probe(case), every_row_inputs(case, CPU)
    for name in ("q", "k", "v", "dout"):
        assert torch.equal(getattr(pure, name), getattr(wide, name)), name


@pytest.mark.parametrize("seed", range(4))
def test_swamped_sums_are_those_of_the_pure_probe(seed: int) -> None:
    case = long_documents(seed)
    pure, wide = swamping_probe(case), swamping_inputs(case, CPU)
    assert pure is not None
    assert wide is not None
    for name in ("q", "k", "v", "dout"):
        assert torch.equal(getattr(pure.inputs, name), getattr(wide.inputs, name)), name
    assert wide.judged.nonzero()[:, 0].tolist() == [document.segment.document for document in pure.swamped] == [0, 2, 4]
    # What the pure probe expects is right, and 60 of the small ones more is wrong.
    results = {"out": torch.zeros(20, 2, 8), "dq": torch.zeros(20, 2, 8)}
    for document in pure.swamped:
        for name, (expected, _) in sums_of(case, pure, document).items():
            results[name][document.segment.queries.end - 1] = expected.float()
    assert not any(wrong.any() for wrong in swamped_sums(case, wide, results, UNIT_ROUNDOFF[case.dtype]).values())
    for name, result in results.items():
        result[-1, 1, 1] += 60 * sums_of(case, pure, pure.swamped[-1])[name][1]
    found = swamped_sums(case, wide, results, UNIT_ROUNDOFF[case.dtype])
    assert {name: wrong.nonzero().tolist() for name, wrong in found.items()} == {
        "out": [[4]],
        "dq": [[4]],
    }


def test_there_is_no_swamping_without_long_documents() -> None:
    assert swamping_inputs(long_documents(0).replace(key_lengths=(31,) * 6), CPU) is None
    assert swamping_inputs(long_documents(0).replace(dtype="fp32"), CPU) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("seed", range(3))
def test_probes_are_silent_on_correct_results_and_look_at_what_they_say(name: str, seed: int) -> None:
    backend = registry.load("loop")
    case = long_documents(seed) if name == "swamping" else drawn(backend, seed).replace(softcap=0.0)
    probe = PROBES[name](case, CPU, backend.kernel.profile)
    assert probe is not None
    results = run(Call.of(case, CPU, probe.inputs), backend)
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
    for probe in PROBES:
        for seed in range(4):
            assert examine_probe(drawn(backend, seed), backend, CPU, probe) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in available_backends("cuda") if takes_batches(n, ("kernel",), "cuda")])
def test_they_pass_on_a_gpu(name: str) -> None:
    backend, device = registry.load(name), torch.device("cuda")
    capabilities = backend.kernel.capabilities_on("cuda")
    case = draw_case(Random(2), Sweep((64, 128), 2), backend, Domain.of(capabilities, "cuda"), 40)
    assert case is not None
    for probe in PROBES:
        if (confirmed_failure := examine_probe(case, backend, device, probe)) is not None:
            assert issues_of(name, "cuda", case, calls_of(case)), confirmed_failure.message


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
    found = examine_probe(case, backend, CPU)
    assert found is not None
    assert found.symptom is WrongKeys
    assert found.documents == (200,)
    assert "6 queries, 13 keys" in found.message


@pytest.mark.parametrize("name", KERNEL_TENSORS)
def test_each_result_is_looked_at(name: str) -> None:
    backend = registry.load("loop")
    case = Case(level="kernel", lengths=(5, 3, 7), key_lengths=(5, 6, 7), head_dim=4, heads=2, dtype="bf16", seed=1)
    probe = keys_probe(case, CPU)
    results = run(Call.of(case, CPU, probe.inputs), backend)
    assert not wrong_documents(case, probe, results).any()
    # The second document's last row, or last key: of documents with a gradient in one row only, most are silent.
    silent = int(probe.row[1] == 2)
    results[name][{"dq": 7 - silent}.get(name, 10 if name in ("dk", "dv") else 7)] += 1.0
    wrong = wrong_documents(case, probe, results)
    assert wrong.nonzero().tolist() == [[1, KERNEL_TENSORS.index(name)]]


def test_no_second_seed_need_agree() -> None:
    outcome = probe_verdict(Case(level="kernel", lengths=(4,), head_dim=4), registry.load("fault:M18"), CPU)
    assert outcome.probe == "keys"
    assert not outcome.failing(10.0).any()
    case = Case(level="kernel", lengths=(4,), key_lengths=(9,), head_dim=4)
    assert probe_verdict(case, registry.load("fault:M18"), CPU).failing(10.0).any()


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
    confirmed_failure = examine_probe(case, Backend("forgetful", Forgetful()), CPU, "every row")
    assert confirmed_failure is not None
    assert confirmed_failure.symptom is WrongKeysBackward
    assert confirmed_failure.documents == (0,)
    assert "the probe 'every row'" in confirmed_failure.message
    assert len(found) == 2


def test_a_probe_without_inputs_gives_way_to_the_keys() -> None:
    short = Case(level="kernel", lengths=(4,), head_dim=4)
    assert probe_verdict(short, registry.load("loop"), CPU, "swamping").probe == "keys"
