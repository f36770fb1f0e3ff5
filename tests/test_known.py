"""Known issues explain what they cover and nothing else, and are still there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from attn_fuzz.backends import known, registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.known import KNOWN, KnownIssue
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign import worker
from attn_fuzz.campaign.isolated import KNOWN_ISSUE, Isolated, Subject
from attn_fuzz.campaign.messages import Assignment, Finished, Found, Message
from attn_fuzz.oracle import known_issues
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.known_issues import EFFECTS, Effect, explains
from attn_fuzz.oracle.symptoms import (
    MovedByPlacement,
    NotBatchInvariant,
    NotCompiled,
    NotMerged,
    NotOrdered,
    NotRegrouped,
    NotReplayed,
    PoisonLeaked,
    Symptom,
    WrongGradK,
    WrongGradQ,
    WrongGradV,
    WrongOutput,
    WrongWhenAsked,
)
from attn_fuzz.reference.case import Case

LAYOUT = Case(level="kernel", lengths=(2, 3))


def issue(**changes: object) -> KnownIssue:
    """An issue of a planted fault: dK and dV swapped (M51-swapped)."""
    plain = KnownIssue(
        id="example",
        backends=("fault:M51-swapped",),
        device="cpu",
        about="dK and dV come back in the wrong order",
        reference="none",
        present=lambda: True,
        covers=lambda case, calls: True,
        minimal=LAYOUT,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


SWAPPED = Effect(tensors=frozenset({"dk", "dv"}), symptoms=frozenset({WrongGradK, WrongGradV}))
"""What it does."""


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes one issue the only one that is known."""

    def inner(issue: KnownIssue, effect: Effect = SWAPPED) -> None:
        monkeypatch.setattr(known, "KNOWN", (issue,))
        monkeypatch.setattr(known_issues, "EFFECTS", {issue.id: effect})

    return inner


def test_every_issue_says_what_it_does() -> None:
    assert set(EFFECTS) == {entry.id for entry in KNOWN}


@pytest.mark.parametrize(
    ("changes", "explained"),
    [
        ({}, True),
        ({"covers": lambda case, calls: calls == [[(2, 2), (3, 3)]]}, True),
        ({"covers": lambda case, calls: len(case.lengths) > 2}, False),
        ({"present": lambda: False}, False),
        ({"device": "cuda"}, False),
        ({"backends": ("loop",)}, False),
    ],
)
def test_an_issue_explains_what_it_covers(
    put: Callable[..., None], changes: dict[str, object], explained: bool
) -> None:
    put(issue(**changes))
    verdict = examine(LAYOUT, registry.load("fault:M51-swapped"), "cpu")
    assert (verdict.first is None) == explained
    if explained:
        assert verdict.known == ("example",)


@pytest.mark.parametrize(
    "effect",
    [
        dataclasses.replace(SWAPPED, tensors=frozenset({"dk"})),
        dataclasses.replace(SWAPPED, symptoms=frozenset({PoisonLeaked})),
        dataclasses.replace(SWAPPED, symptoms=frozenset(), nan_symptoms=SWAPPED.symptoms),
    ],
)
def test_an_issue_explains_nothing_else(put: Callable[..., None], effect: Effect) -> None:
    put(issue(), effect)
    assert examine(LAYOUT, registry.load("fault:M51-swapped"), "cpu").first is not None


ENTRIES = [pytest.param(entry, name, id=f"{entry.id}-{name}") for entry in KNOWN for name in entry.backends]


def on_gpus(entry: KnownIssue, name: str) -> pytest.MarkDecorator:
    """``cuda``, which a GPU machine may have to run, unless what the issue is of is not on this one."""
    if torch.cuda.is_available():
        if (reason := registry.load(name).kernel.why_unavailable(entry.device)) is not None:
            return pytest.mark.skip(reason=f"{name}: {reason}")
        if not entry.applies(name, entry.device):
            return pytest.mark.skip(reason="not the versions it was seen on")
    return pytest.mark.cuda


@pytest.mark.parametrize(("entry", "name"), ENTRIES)
def test_an_issue_is_well_formed(entry: KnownIssue, name: str) -> None:
    backend = dataclasses.replace(registry.load(name), isolated=True)
    assert backend.refusal(entry.minimal, entry.device) is None
    assert entry.covers(entry.minimal, registry.calls_of(entry.minimal))
    assert entry.about
    assert entry.reference


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        pytest.param(entry, name, id=f"{entry.id}-{name}", marks=on_gpus(entry, name))
        for entry in KNOWN
        for name in entry.backends
    ],
)
def test_an_issue_is_still_there(entry: KnownIssue, name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gone = f"{entry.id} no longer shows on {name}: take it out of backends/known.py"
    if entry.crashes:
        child = Isolated(Subject(name, entry.device), 120.0)
        try:
            assert child.symptom(entry.minimal) in {"Crashed", KNOWN_ISSUE}, gone
        finally:
            child.close()
        return
    verdict = examine(entry.minimal, registry.load(name), entry.device)
    assert entry.id in verdict.known, gone
    assert verdict.symptoms == ()


@pytest.mark.parametrize("nan", [True, False])
def test_an_issue_may_explain_nan_only(put: Callable[..., None], nan: bool) -> None:
    class Kernel(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            attended = super().attend(q, k, v, metadata, options)
            return attended._replace(out=attended.out * (torch.nan if nan else 2.0))

    effect = Effect(
        tensors=frozenset({"out", "dq", "dk", "dv"}),
        symptoms=frozenset({PoisonLeaked, WrongGradV, WrongGradQ, WrongGradK}),
        nan_symptoms=frozenset({WrongOutput}),
    )
    put(issue(backends=("double",)), effect)
    verdict = examine(LAYOUT, Backend("double", Kernel()), "cpu", probes=())
    assert verdict.known == ("example",)
    assert {type(symptom).__name__ for symptom in verdict.symptoms} == (set() if nan else {"WrongOutput"})


ALSO = [
    pytest.param(entry, name, case, id=f"{entry.id}-{name}", marks=on_gpus(entry, name))
    for issue_id, name, case in (
        (
            "cudnn-masked-backward-nan",
            "sdpa_dense",
            Case(
                level="kernel",
                lengths=(6,),
                key_lengths=(192,),
                head_dim=8,
                window=(0, -1),
                dtype="fp16",
                values="large",
            ),
        ),
    )
    for entry in KNOWN
    if entry.id == issue_id
]


RELATIONS = (MovedByPlacement, NotBatchInvariant, NotCompiled, NotMerged, NotOrdered, NotRegrouped, NotReplayed)


@pytest.mark.parametrize("symptom", [*RELATIONS, WrongWhenAsked])
@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: entry.id)
def test_what_spoils_results_spoils_what_is_compared_with_them(entry: KnownIssue, symptom: type[Symptom]) -> None:
    """Rows behind documents were known to hold NaN, and a campaign was told of it by another company of documents."""
    assert explains(entry, symptom("company", next(iter(EFFECTS[entry.id].tensors)), "got nan", nan=True))
    assert not explains(entry, symptom("company", "another result", "got nan", nan=True))


@pytest.mark.parametrize(("entry", "name", "case"), ALSO)
def test_an_issue_explains_what_campaigns_met(entry: KnownIssue, name: str, case: Case) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    verdict = examine(case, registry.load(name), entry.device)
    assert verdict.known == (entry.id,)
    assert verdict.symptoms == ()


def crashing(**changes: object) -> KnownIssue:
    """A crash-class issue of a healthy backend, so that nothing but the bookkeeping is under test."""
    return issue(backends=("loop",), crashes=True, **changes)


def test_what_crashes_is_refused_outside_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "KNOWN", (crashing(),))
    backend = registry.load("loop")
    refusal = backend.refusal(LAYOUT, "cpu")
    assert refusal is not None
    assert "example" in refusal
    assert dataclasses.replace(backend, isolated=True).refusal(LAYOUT, "cpu") is None


@pytest.mark.slow
def test_a_campaign_runs_a_few_crash_class_cases_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "KNOWN", (crashing(covers=lambda case, calls: case.capacity > 0),))
    monkeypatch.setattr(worker, "Isolated", _Dying)
    messages: list[Message] = []
    job = Assignment(backend="loop", device="cpu", seed=3, levels=("kernel",), cases=24)
    worker.work(job, messages.append)
    last = messages[-1]
    assert isinstance(last, Finished)
    assert last.tally.known == {"example": 2}
    assert last.tally.refused > 0
    assert not [message for message in messages if isinstance(message, Found)]


def test_what_is_refused_anyway_is_no_crash_class_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would run, so nothing is counted: every drawn case with rows behind the last document is refused."""
    monkeypatch.setattr(known, "KNOWN", (dataclasses.replace(crashing(), backends=("sdpa_dense",)),))
    begun = worker.Worker(Assignment(backend="sdpa_dense", device="cpu", seed=3), lambda message: None)
    assert begun.only_isolated(LAYOUT.replace(capacity=1)) is None
    assert begun.only_isolated(LAYOUT) is not None


class _Dying:
    """Stands for a child process that dies of every case."""

    def __init__(self, subject: Subject, timeout: float, soon: float | None = None) -> None:
        pass

    def symptom(self, case: Case) -> str:
        return "Crashed"

    def close(self) -> None:
        pass
