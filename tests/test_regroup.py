"""Regrouping: another order of documents, other cuts, the same results."""

from __future__ import annotations

import pytest
import torch
from doubles import trial

from attn_fuzz.backends import registry
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.loop import Call, Document, Loop
from attn_fuzz.backends.registry import Backend
from attn_fuzz.oracle.checks.regroup import recut, regrouped, regrouped_case
from attn_fuzz.oracle.symptoms import NotRegrouped
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

CPU = torch.device("cpu")
CASE = Case(level="kernel", lengths=(3, 0, 4), key_lengths=(3, 2, 6), document_ids=(5, 1, 3), heads=2, kv_heads=1)


# The other arrangement.


def test_the_first_document_goes_last_with_its_keys_and_its_name() -> None:
    other = regrouped_case(CASE)
    assert other is not None
    assert (other.lengths, other.key_lengths, other.document_ids) == ((0, 4, 3), (2, 6, 3), (1, 3, 5))
    assert regrouped_case(CASE.replace(key_lengths=None, document_ids=None)).document_ids == (1, 2, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize(("cuts", "other"), [((2, 5), ()), ((), (4,))])
def test_what_was_cut_is_not_and_what_was_not_is(cuts: tuple[int, ...], other: tuple[int, ...]) -> None:
    case = Case(lengths=(6, 3), cuts=cuts)
    assert recut(case) == case.replace(cuts=other)


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(1,)),
        Case(lengths=(6, 3), causal=False),
        CASE.replace(memory="broadcast"),
        Case(level="kernel", lengths=(3,)),
    ],
    ids=["one token", "non-causal cut", "one gradient for all rows", "one document"],
)
def test_there_may_be_no_other_arrangement(case: Case) -> None:
    assert regrouped_case(case) is None
    assert list(regrouped(Trial(case, registry.load("fault:M10"), CPU))) == []


# Right ones.


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        CASE.replace(dtype="bf16", capacity=2, memory="sliced"),
        Case(lengths=(4, 1, 6), cuts=(2, 7), dtype="bf16", key_norm="rms", rotary="default"),
        Case(lengths=(4, 1, 6), padding=2),
    ],
    ids=["kernel", "kernel bf16", "layer", "uncut layer"],
)
def test_silent_on_a_right_backend(case: Case) -> None:
    assert list(regrouped(Trial(case, registry.load("loop"), CPU))) == []


# Wrong ones.


class SecondIsWrong(Loop):
    """The second document of a call that has queries is computed with half of the scale."""

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        scores, slope = super().scores(call, document)
        return (scores / 2 if document.index == 1 else scores), slope


class FirstAndLastDiffer(SecondIsWrong):
    """Only where the first document is the shorter one: the case passes, and fails turned."""

    def scores(self, call: Call, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = call.metadata.cu_seqlens_q.diff().tolist()
        return super().scores(call, document) if lengths[0] < lengths[-1] else Loop.scores(self, call, document)


def test_an_order_that_fails_is_seen_from_one_that_passes() -> None:
    case = Case(level="kernel", lengths=(5, 3), heads=2)
    symptoms = list(regrouped(trial(FirstAndLastDiffer(), case)))
    assert {symptom.tensor for symptom in symptoms} >= {"out", "dq", "dk"}
    for symptom in symptoms:
        assert (type(symptom), symptom.check) == (NotRegrouped, "regrouping")
        assert symptom.message.startswith("with its first document last: document 1, ")
        assert symptom.z is not None
    assert list(regrouped(trial(FirstAndLastDiffer(), case.replace(lengths=(3, 5))))) == []


class LosesWhenCut(BufferedLayer):
    """Cut, its output is 2 % too large."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        return out * 1.02 if (begin, end) != (0, self.case.tokens) else out


def test_cuts_that_fail_are_seen_from_the_uncut_case() -> None:
    backend = Backend("double", registry.load("loop").kernel, LosesWhenCut)
    symptoms = list(regrouped(Trial(Case(lengths=(6, 3)), backend, CPU)))
    assert [symptom.tensor for symptom in symptoms] == ["out"]
    assert symptoms[0].message.startswith("cut at [4]: ")
    assert list(regrouped(Trial(Case(lengths=(6, 3), cuts=(4,)), backend, CPU))) == []


class Counts(Loop):
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def documents(self, *args: object, **options: object) -> list[Document]:
        self.calls += 1
        return super().documents(*args, **options)  # type: ignore[arg-type]


def test_an_arrangement_that_is_not_taken_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(self: object, case: Case, calls: object) -> str | None:
        return None if sorted(case.lengths) == list(case.lengths) else "falling lengths"

    loop = Counts()
    probe = trial(loop, Case(level="kernel", lengths=(3, 5)))
    monkeypatch.setattr(type(probe.backend.kernel), "limit", limit)
    assert probe.observations
    loop.calls = 0
    assert list(regrouped(probe)) == []
    assert loop.calls == 0
