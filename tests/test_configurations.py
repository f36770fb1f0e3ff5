"""Workers of a backend that compiles: within configurations that are ready, in every mode, compiling counted apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import Compiling, NobodyBeside, compiling, configuration, configurations_of

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Configuration
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign import configurations
from attn_fuzz.campaign.compiling_time import CompilingTime
from attn_fuzz.campaign.limits import infer_limits
from attn_fuzz.campaign.messages import Assignment, Finished, Found, Message, Trying
from attn_fuzz.campaign.plan import CampaignOptions, plan
from attn_fuzz.campaign.serve import WORK
from attn_fuzz.execution.runner import run_kernel
from attn_fuzz.generation.configurations import FIRST
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case

MODES = (pytest.param("case", marks=pytest.mark.slow), "batch")
SMALL: dict[str, Any] = {"head_dims": (8, 16), "dtypes": ("fp32", "bf16"), "softcap": False}


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Message]]:
    """What a worker of a backend says, in this process and with nobody beside it."""
    monkeypatch.setattr(configurations, "Ahead", NobodyBeside)

    def told(backend: Backend, mode: str, **job: Any) -> list[Message]:
        monkeypatch.setattr(registry, "load", lambda name: backend)
        said: list[Message] = []
        given = {
            "seed": 0,
            "cases": 24 if mode == "batch" else 6,
            "levels": ("kernel",),
            "without": {"compiles": True},
            **job,
        }
        WORK[mode](Assignment(backend="compiling", device="cpu", mode=mode, **given), said.append)
        return said

    return told


def finished(said: list[Message]) -> Finished:
    last = said[-1]
    assert isinstance(last, Finished), last
    return last


@pytest.mark.parametrize("mode", MODES)
def test_cases_are_drawn_within_few_configurations(mode: str, messages: Callable[..., list[Message]]) -> None:
    backend = compiling(**SMALL)
    tally = finished(said := messages(backend, mode)).tally
    assert not [message for message in said if isinstance(message, Found)]
    assert 2 <= len(tally.by_configuration) <= FIRST + 3
    assert sum(tally.by_configuration.values()) == tally.cases
    assert tally.compiling_seconds >= tally.warm_up_seconds > 0
    # What was compiled is what was drawn, and nothing else was ever called.
    tried = {Configuration.of(Case.from_json(each.case)) for each in said if isinstance(each, Trying)}
    assert {each.words() for each in tried} == set(tally.by_configuration)
    assert len(configurations_of(backend)) <= len(tally.by_configuration)


@pytest.mark.slow
def test_it_compiles_far_less_than_where_all_is_drawn(messages: Callable[..., list[Message]]) -> None:
    """Seconds by the kernel's own clock, of which nearly all are compiling."""

    def seconds(without: dict[str, Any]) -> float:
        backend = compiling(max_head_dim=40)
        assert finished(messages(backend, "batch", without=without, cases=320)).tally.cases == 320
        assert isinstance(backend.kernel, Compiling)
        return backend.kernel.now

    assert 2 * seconds({"compiles": True}) < seconds({})


def _wrong_at_16(q: torch.Tensor, options: AttentionOptions, attended: Attended) -> Attended:
    if q.shape[2] == 16 and not options.causal:
        return attended._replace(out=attended.out * 1.5)
    return attended


def test_a_fault_of_one_kind_of_configuration_is_found(messages: Callable[..., list[Message]]) -> None:
    said = messages(compiling(deed=_wrong_at_16, **SMALL), "batch", cases=400, stop_at_first=True)
    (finding,) = [message.finding for message in said if isinstance(message, Found)]
    assert (finding.case.head_dim, finding.case.causal) == (16, False)
    assert len(finding.case.lengths) == 1
    # Every case is one that runs by itself.
    assert Case.from_json(finding.case.to_json()) == finding.case


@pytest.mark.slow
def test_layers_are_drawn_within_them_too(messages: Callable[..., list[Message]]) -> None:
    backend = Backend("compiling", compiling(**SMALL).kernel)
    tally = finished(messages(backend, "batch", levels=("layer",), cases=24)).tally
    assert set(tally.by_kind) <= {"batch-layer fp32", "batch-layer bf16"}
    assert sum(tally.by_configuration.values()) == tally.cases == 24
    assert len(configurations_of(backend)) <= len(tally.by_configuration)


@pytest.mark.slow
def test_shapes_that_are_compiled_for_come_from_a_few_layouts(messages: Callable[..., list[Message]]) -> None:
    layouts = 4
    backend = compiling(lambda q, metadata, options: tuple(sorted(metadata.lengths_q)), layouts=layouts, **SMALL)
    without = {"compiles": True, "layouts": layouts, "capacity": False}
    tally = finished(messages(backend, "batch", without=without, cases=40)).tally
    assert tally.cases >= 40
    # Questions about isolation and the like run whole calls; only `inferred` has two layouts of its own.
    assert len(configurations_of(backend)) <= layouts + 2


@pytest.mark.parametrize(
    ("mode", "layouts", "first"), [("batch", 4, 1), ("case", 4, 2), ("batch", 0, 1), ("case", 0, 4)]
)
def test_a_campaign_begins_with_what_its_first_batch_needs(
    mode: str, layouts: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call where batches hurry; else one for each memory layout of what compiles for shapes, or each plain one."""
    monkeypatch.setattr(configurations, "Ahead", NobodyBeside)
    memories = {"memories": ("contiguous", "sliced")}
    backend = compiling(configuration, compiles=True, layouts=layouts, **memories, **SMALL)
    job = Assignment(backend="compiling", device="cpu", seed=0, levels=("kernel",), seconds=9.0, mode=mode)
    ran = list[Case]()
    found = configurations.Configurations(job, backend, ran.append)
    assert found.begin()
    found.close()
    assert len(ran) == first


def _of_each_document(q: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions) -> tuple[object, ...]:
    """As many variants as there are sets of kinds of documents."""
    kinds = {(n == 1, n % 16 == 0, n % 5, m % 5) for n, m in zip(metadata.lengths_q, metadata.lengths_k, strict=True)}
    return configuration(q, metadata, options), *sorted(kinds)


@pytest.fixture
def by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend], Backend]:
    """Has what a worker's calls spend compiling told by the clock of the kernel."""

    def timed(backend: Backend) -> Backend:
        kernel = backend.kernel
        assert isinstance(kernel, Compiling)
        monkeypatch.setattr(configurations, "CompilingTime", lambda: CompilingTime(lambda: 0, kernel.clock))
        return backend

    return timed


def test_batches_that_compile_for_long_are_cut_short_and_calls_that_are_ready_are_made_again(
    messages: Callable[..., list[Message]], by_its_own_clock: Callable[[Backend], Backend]
) -> None:
    backend = by_its_own_clock(compiling(_of_each_document, **SMALL))
    tally = finished(messages(backend, "batch", cases=300, seconds=1000.0)).tally
    assert tally.cases == 300
    assert sum(tally.by_configuration.values()) == 300
    # New calls all compile; those that are ready have other values each time.
    assert len(configurations_of(backend)) < 150


def test_so_many_cases_are_all_drawn_anew(
    messages: Callable[..., list[Message]], by_its_own_clock: Callable[[Backend], Backend]
) -> None:
    counts = set[int]()
    for _ in range(2):
        backend = by_its_own_clock(compiling(_of_each_document, **SMALL))
        assert finished(messages(backend, "batch", cases=40)).tally.cases == 40
        counts.add(len(configurations_of(backend)))
    assert len(counts) == 1


def test_what_does_not_compile_has_no_pool(messages: Callable[..., list[Message]]) -> None:
    tally = finished(messages(compiling(None, **SMALL), "batch", without={})).tally
    assert tally.by_configuration == {}
    assert tally.compiling_seconds == tally.warm_up_seconds == 0


def test_what_calls_show_of_a_kernel_holds_within_configurations(tmp_path: Path) -> None:
    """An LSE with a gradient, which is told of by calls only."""
    text = "def kernel(q, k, v, a, b, c, d):\n    return q + 0 * (k.sum() + v.sum()), q.sum(-1).T.float()\n"
    (tmp_path / "shows.py").write_text(text)
    ready = (Configuration("fp32", 8, 1, 1, False),)
    backend = registry.within(registry.load(f"{tmp_path / 'shows.py'}:kernel"), lambda: ready)
    assert not backend.kernel.capabilities_on("cpu").lse_gradient
    case = Case(level="kernel", lengths=(3,), head_dim=8, heads=1, kv_heads=1, causal=False, dtype="fp32")
    run_kernel(backend, case, kernel_inputs(case, "cpu"), "nan", torch.device("cpu"))
    assert backend.kernel.capabilities_on("cpu").lse_gradient
    assert backend.kernel.capabilities_on("cpu").configurations == ready


def test_cores_that_are_left_compile_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)

    def compilers(workers: int) -> set[int]:
        options = CampaignOptions(device="cpu", workers=workers, levels=("kernel",), modes=("case", "batch"))
        return {each.compilers for each in plan(("loop",), options)}

    assert compilers(2) == {4}
    assert compilers(8) == {1}
    assert compilers(16) == {0}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_kernel_whose_first_calls_take_long_is_noticed_and_its_fault_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the clock of the processor, which no other process makes slower."""
    monkeypatch.setenv("ATTN_FUZZ_COMPILING", "0.25")
    monkeypatch.setenv("ATTN_FUZZ_FAULT", "1")
    name = f"{Path(__file__).parent / 'slow_first_call.py'}:kernel"
    without = infer_limits(name, "cpu", ("bf16",), 1, lambda limit: None).without
    assert without["compiles"]
    said = list[Message]()
    job = Assignment(backend=name, device="cpu", seed=0, cases=400, mode="batch", levels=("kernel",), without=without)
    WORK["batch"](dataclasses.replace(job, stop_at_first=True), said.append)
    (finding,) = [message.finding for message in said if isinstance(message, Found)]
    assert not finding.case.causal
    assert len(finding.case.lengths) == 1
    assert len(finished(said).tally.by_configuration) > 1
