"""The packed mode at layer level: its answer is the layer's, clean layers pass, the known-bad one does not."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.batch.layer import draw_layer_case, judge_layer
from attn_fuzz.batch.packed import packed_failure
from attn_fuzz.campaign.messages import Assignment, Finished, Found, Message
from attn_fuzz.campaign.packed_worker import work_on_packed
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.strategies import straddling
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.exact_layer import exact_layer_answer, is_exact
from attn_fuzz.reference.layer import layer_answer, layer_inputs
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")


def drawn(name: str, seed: int, documents: int) -> Case:
    backend = registry.load(name)
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    case = draw_layer_case(Random(seed), backend, domain, documents, 17)
    assert case is not None
    return case


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_the_layer(seed: int) -> None:
    case = drawn("loop", seed, 5)
    assert is_exact(case)
    inputs = layer_inputs(case, "cpu")
    whole, exact = layer_answer(case, inputs, Profile()), exact_layer_answer(case, inputs, Profile())
    for name, expected in exact.items():
        assert torch.allclose(expected.value, whole[name].value, rtol=1e-10, atol=1e-10), name
        assert (expected.variance[whole[name].value.abs() > 1e-9] > 0).all(), name


@pytest.mark.parametrize(
    "changes", [{"rotary": "default"}, {"query_norm": "rms"}, {"hidden": 8}, {"weights": "gaussian"}]
)
def test_what_is_no_exact_layer(changes: dict[str, object]) -> None:
    exact = Case(lengths=(4,), hidden=16, weights="selection")
    assert is_exact(exact)
    assert not is_exact(exact.replace(**changes))


@pytest.mark.parametrize("name", registry.kernel_names())
def test_clean_layers_pass(name: str) -> None:
    backend = registry.load(name)
    if backend.kernel.why_unavailable("cpu") is not None:
        pytest.skip("not on this machine")
    if not backend.kernel.capabilities_on("cpu").causal:
        pytest.skip("takes no causal attention, so that no document straddles a cut")
    cases = [drawn(name, seed, 12) for seed in range(3)]
    assert any(straddling(case) for case in cases)
    for case in cases:
        assert packed_failure(case, backend, CPU) is None, case.to_json()


class Cramped(LoopKernel):
    """Finds no memory for what its library allocates."""

    def attend(self, *args: object) -> Attended:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_a_lack_of_memory_accuses_no_layer() -> None:
    backend = dataclasses.replace(registry.load("loop"), kernel=Cramped())
    with pytest.raises(torch.OutOfMemoryError):
        judge_layer(drawn("loop", 0, 5), backend, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["legacy:loop", "fault:X22"])
def test_a_faulty_layer_is_found_and_shrunk(name: str) -> None:
    messages: list[Message] = []
    job = Assignment(backend=name, device="cpu", seed=1, levels=("layer",), cases=6, stop_at_first=True)
    work_on_packed(job, messages.append)
    assert isinstance(messages[-1], Finished)
    (finding,) = (message.finding for message in messages if isinstance(message, Found))
    assert len(finding.case.lengths) <= 3
    assert finding.case.cuts
    assert "packed" not in finding.checks


OVERFLOWS = (
    '{"lengths": [3, 2], "cuts": [4], "weights": "selection", "dtype": "bf16", "values": "large", "scale": 1e18}'
)
LOOKED_AT = [(name, "") for name in ("loop", "legacy:loop", "fault:M18", "fault:M12")]


@pytest.mark.parametrize(("name", "text"), [*LOOKED_AT, ("loop", OVERFLOWS)])
def test_a_first_look_in_float32_leaves_verdicts_as_they_are(name: str, text: str) -> None:
    backend = registry.load(name)
    cases = [Case.from_json(text)] if text else [drawn("loop", seed, 40).replace(dtype="bf16") for seed in range(3)]
    for case in cases:
        exact, looked = (judge_layer(case, backend, CPU, first_look=look) for look in (False, True))
        assert torch.equal(exact.wrong(), looked.wrong())
        doubtful = ~(looked.z < 7.0).all(1)
        # Judged again, the same to the bit or the order of sums.
        assert torch.allclose(exact.z[doubtful], looked.z[doubtful], rtol=1e-6)
        assert torch.allclose(exact.z[~doubtful], looked.z[~doubtful], atol=0.5)
