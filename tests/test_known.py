"""Known issues explain what they cover and nothing else, and are still there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_fuzz.examine import examine
from backends import known, registry
from backends.known import KNOWN, KnownIssue
from reference.case import Case

LAYOUT = Case(level="kernel", lengths=(2, 3))


def issue(**changes: object) -> KnownIssue:
    """An issue of a planted fault: dK and dV swapped (M51-swapped)."""
    plain = KnownIssue(
        id="example",
        backend="fault:M51-swapped",
        device="cpu",
        about="dK and dV come back in the wrong order",
        reference="none",
        present=lambda: True,
        covers=lambda case, calls: True,
        tensors=frozenset({"dk", "dv"}),
        symptoms=frozenset({"WrongGradK", "WrongGradV"}),
        minimal=LAYOUT,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "explained"),
    [
        ({}, True),
        ({"covers": lambda case, calls: calls == [[(2, 2), (3, 3)]]}, True),
        ({"covers": lambda case, calls: len(case.lengths) > 2}, False),
        ({"tensors": frozenset({"dk"})}, False),
        ({"symptoms": frozenset({"PoisonLeaked"})}, False),
        ({"present": lambda: False}, False),
        ({"device": "cuda"}, False),
        ({"backend": "loop"}, False),
    ],
)
def test_an_issue_explains_what_it_covers(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], explained: bool
) -> None:
    monkeypatch.setattr(known, "KNOWN", (issue(**changes),))
    verdict = examine(LAYOUT, registry.load("fault:M51-swapped"), "cpu")
    assert (verdict.first is None) == explained
    if explained:
        assert verdict.known == ("example",)


@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: entry.id)
def test_an_issue_is_well_formed(entry: KnownIssue) -> None:
    backend = registry.load(entry.backend)
    assert backend.refusal(entry.minimal, entry.device) is None
    assert entry.covers(entry.minimal, registry.calls_of(entry.minimal))
    assert entry.about
    assert entry.reference


@pytest.mark.cuda
@pytest.mark.parametrize("entry", [e for e in KNOWN if e.device == "cuda"], ids=lambda entry: entry.id)
def test_an_issue_is_still_there(entry: KnownIssue) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not entry.applies(entry.backend, entry.device):
        pytest.skip("not the versions it was seen on")
    verdict = examine(entry.minimal, registry.load(entry.backend), entry.device)
    assert entry.id in verdict.known, f"{entry.id} no longer shows: take it out of backends/known.py"
    assert verdict.symptoms == ()
