"""Capabilities, asked: what is declared is right, and a wrong declaration is seen."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import threading

import pytest

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.backends.unlimited import Unlimited
from attn_fuzz.campaign.limit_questions import GROUPED_VALUES
from attn_fuzz.evaluation.capability_probe import RIGHT, Answer, Probing, base_case, probes
from attn_fuzz.reference.case import Case


def declared(name: str, capabilities: Capabilities) -> dict[str, bool]:
    return {probe.name: probe.stated for probe in probes(capabilities)}


@pytest.mark.parametrize("name", registry.kernel_names())
def test_plain_cases_are_taken_by_declaration(name: str) -> None:
    backend = registry.load(name)
    for device in backend.kernel.capabilities.devices:
        capabilities = backend.kernel.capabilities_on(device)
        assert backend.refusal(base_case(capabilities), device) is None


@pytest.mark.parametrize("name", registry.kernel_names())
def test_statements_agree_with_refusals(name: str) -> None:
    """What the probe takes for declared is what the adapter lets through, its finer limits aside."""
    backend = registry.load(name)
    device = backend.kernel.capabilities.devices[-1]
    capabilities = backend.kernel.capabilities_on(device)
    for probe in probes(capabilities):
        lengths = registry.calls_of(probe.case)
        refused = capabilities.refusal(probe.case, device, [pair for call in lengths for pair in call])
        if refused is not None and "compile" not in refused:
            assert not probe.stated, (probe.name, refused)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dtypes": ("bf16",)}, "dtype fp32"),
        ({"max_head_dim": 128}, "head_dim 192"),
        ({"head_dim_multiple": 8}, "head_dim 5"),
        ({"head_dims": (64,)}, "head_dim 32"),
        ({"gqa": False}, "grouped heads"),
        ({"window": False}, "window, causal"),
        ({"window_needs_causal": True}, "window, non-causal"),
        ({"softcap": False}, "softcap"),
        ({"empty_documents": False}, "empty documents"),
        ({"queries_without_keys": False}, "documents without keys"),
        ({"keys_without_queries": False}, "documents without queries"),
        ({"causal_needs_equal_lengths": True}, "causal, more keys than queries"),
        ({"memories": ("contiguous",)}, "memory strided"),
        ({"capacity": False}, "rows beyond the last document"),
        ({"lse_gradient": False}, "gradient of the LSE"),
        ({"gqa_head_dims_v": False, "head_dims_v": True}, GROUPED_VALUES),
    ],
)
def test_every_capability_has_a_question(changes: dict[str, object], name: str) -> None:
    assert declared("all", Capabilities(lse_gradient=True, head_dims_v=True))[name]
    assert not declared("less", dataclasses.replace(Capabilities(), **changes))[name]  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_wrong_statement_is_seen() -> None:
    """The planted fault of unpacked strides says that it takes every layout."""
    heard: list[Answer] = []
    probing = Probing("cpu", lambda _, answer: heard.append(answer))
    probing.ask(["fault:M32-row"], 1)
    answers = probing.answers["fault:M32-row"]
    assert heard == answers
    assert not probing.interrupted
    by_name = {answer.probe: answer for answer in answers}
    assert by_name["memory contiguous"].measured == RIGHT
    assert any(answer.differs and answer.stated and answer.measured.startswith("wrong") for answer in answers)


def test_an_interruption_loses_no_answer_and_leaves_no_process() -> None:
    """As of Ctrl-C: the signal comes while the second backend is asked."""

    def interrupt(name: str, answer: Answer) -> None:
        if name == "sdpa_dense_math":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        probing = Probing("cpu", interrupt)
        probing.ask(["loop", "sdpa_dense_math"], 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert probing.interrupted
    assert probing.answers["sdpa_dense_math"][0].measured == RIGHT
    assert len(probing.answers["sdpa_dense_math"]) < len(probes(registry.load("loop").kernel.capabilities))
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_limits_are_set_aside_and_conventions_kept() -> None:
    kernel = registry.load("flash").kernel
    free = Unlimited(kernel).capabilities_on("cuda")
    assert free.dtypes == Capabilities().dtypes
    assert free.lse_of_blind_rows == kernel.capabilities.lse_of_blind_rows
    assert registry.load("unrestricted:loop").refusal(Case(level="kernel"), "cpu") is None


def test_a_compiling_backend_takes_its_configurations_only() -> None:
    capabilities = Capabilities(configurations=(Configuration("fp32", 16, 1, 1, True, "left"),))
    case = Case(level="kernel", lengths=(3,), window=(1, -1))
    assert capabilities.refusal(case, "cpu", [(3, 3)]) is None
    refused = capabilities.refusal(case.replace(window=(-1, -1)), "cpu", [(3, 3)])
    assert refused is not None
    assert "compile" in refused
