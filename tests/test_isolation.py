"""Isolation: garbage in other documents and in keys that are not seen moves nothing, and is seen where it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from doubles import double, trial

from attn_fuzz.backends import registry
from attn_fuzz.backends.loop import Call, Document, Loop
from attn_fuzz.oracle.checks.isolation import documents_apart, future_apart
from attn_fuzz.oracle.relations.isolation import kept_documents
from attn_fuzz.oracle.symptoms import NotIsolated
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

CASE = Case(level="kernel", lengths=(3, 0, 4, 2), key_lengths=(5, 2, 4, 3), heads=2, head_dim=4)
CPU = torch.device("cpu")


class SharedMaximum(Loop):
    """All documents are scaled by what the first key of the pack holds, a last bit's worth."""

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(call, q, k, v)
        return out * (1 + 2.0**-22 * (k[0, 0, 0].abs() > 50)), lse


class LeaksBackward(Loop):
    """dV of every document has a little of the last row's output gradient."""

    def backward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = super().backward(call, q, k, v, *rest)
        return dq, dk, torch.where(dv == 0, dv, dv + 1e-6 * rest[-1][-1, 0, 0])


class SeesLaterKeys(Loop):
    """Masked keys weigh next to nothing instead of nothing."""

    def masked(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, scores, scores.clamp(max=0) - 12.0)


def found(loop: Loop, case: Case) -> dict[str, list[str]]:
    """Tensors that each check accuses, over seeds: which documents are kept and what garbage is, depends on them."""
    accused: dict[str, list[str]] = {"documents": [], "future": []}
    for seed in range(6):
        probe = trial(loop, case.replace(seed=seed))
        for name, check in (("documents", documents_apart), ("future", future_apart)):
            symptoms = list(check(probe))
            assert all(type(symptom) is NotIsolated and symptom.check == "isolation" for symptom in symptoms)
            accused[name] += [symptom.tensor for symptom in symptoms]
    return {name: sorted(set(tensors)) for name, tensors in accused.items()}


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        CASE.replace(causal=False, window=(1, 1)),
        CASE.replace(causal=False),
        CASE.replace(memory="broadcast"),
        CASE.replace(dtype="bf16", capacity=3),
    ],
    ids=["causal", "window", "all keys", "broadcast", "spare rows"],
)
def test_silent_on_a_right_kernel(case: Case) -> None:
    assert found(Loop(), case) == {"documents": [], "future": []}


@pytest.mark.parametrize("level", ["kernel", "layer"])
def test_silent_on_a_right_backend(level: str) -> None:
    case = CASE if level == "kernel" else Case(lengths=(3, 0, 4, 2), cuts=(2, 5), padding=2, dtype="bf16")
    for seed in range(6):
        assert list(documents_apart(Trial(case.replace(seed=seed), registry.load("loop"), CPU))) == []


@pytest.mark.parametrize(
    ("loop", "documents"),
    [(SharedMaximum, ["out"]), (LeaksBackward, ["dv"])],
)
def test_a_document_that_depends_on_another_is_seen(loop: Callable[[], Loop], documents: list[str]) -> None:
    accused = found(loop(), CASE)
    assert set(documents) <= set(accused["documents"])


def test_keys_that_are_not_seen_and_weigh_something_are_seen() -> None:
    accused = found(SeesLaterKeys(), CASE)
    assert accused["documents"] == []
    assert "out" in accused["future"]


def test_a_symptom_names_the_first_document_and_row() -> None:
    symptoms = [s for seed in range(6) for s in documents_apart(trial(SharedMaximum(), CASE.replace(seed=seed)))]
    assert "changes with other documents' values" in symptoms[0].message
    assert symptoms[0].message.startswith("document ")


class MixesNaN(Loop):
    """Adds 0 times everything, as a product with an explicit mask does."""

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(call, q, k, v)
        return out + (0 * v.float().sum()).to(out.dtype), lse


def test_garbage_is_not_finite_only_where_a_backend_keeps_that_apart() -> None:
    """The declaration decides: without it no kernel is accused, with it the same one is."""
    for seed in range(6):
        case = CASE.replace(seed=seed)
        assert list(documents_apart(Trial(case, double(MixesNaN(), isolates_nonfinite=False), CPU))) == []
    assert "out" in found(MixesNaN(), CASE)["documents"]


class FirstChannelNaN(Loop):
    """Gives NaN in the first channel, whatever the values are."""

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(call, q, k, v)
        return out.index_fill(-1, torch.tensor([0]), torch.nan), lse


def test_what_is_nan_with_any_garbage_does_not_depend_on_it() -> None:
    assert found(FirstChannelNaN(), CASE) == {"documents": [], "future": []}


def test_a_promise_of_bits_is_needed_for_a_bit_to_accuse() -> None:
    for seed in range(6):
        probe = Trial(CASE.replace(seed=seed), double(SharedMaximum(), repeatable=False), CPU)
        assert list(documents_apart(probe)) == []


@pytest.mark.parametrize(
    ("lengths", "seed", "kept"),
    [((1, 1, 1, 1), 0, [0, 2]), ((1, 1, 1, 1), 3, [1, 3]), ((1, 1, 1), 5, [1]), ((1, 1), 2, [0])],
)
def test_every_other_document_is_kept(lengths: tuple[int, ...], seed: int, kept: list[int]) -> None:
    assert kept_documents(Case(level="kernel", lengths=lengths, seed=seed)) == kept


def test_there_is_nothing_to_isolate_in_one_document_or_without_a_mask() -> None:
    assert list(documents_apart(trial(SharedMaximum(), Case(level="kernel", lengths=(3,))))) == []
    assert list(future_apart(trial(SeesLaterKeys(), Case(level="kernel", lengths=(3,), causal=False)))) == []


def test_padding_counts_as_a_document() -> None:
    case = Case(lengths=(4,), padding=2)
    assert kept_documents(case) == [0]
    assert list(documents_apart(Trial(case, registry.load("loop"), CPU))) == []


class Seen(Loop):
    """Notes which documents were handed garbage."""

    def __init__(self) -> None:
        self.spoilt: list[tuple[bool, ...]] = []

    def documents(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backward: bool
    ) -> list[Document]:
        found = super().documents(call, q, k, v, backward=backward)
        self.spoilt.append(tuple(bool((~(d.k.abs() < 50)).all()) for d in found if d.seen))
        return found


def test_all_other_documents_are_garbage() -> None:
    loop = Seen()
    case = Case(level="kernel", lengths=(2, 3, 1), seed=0)
    probe = trial(loop, case)
    assert probe.observations
    loop.spoilt.clear()
    assert list(documents_apart(probe)) == []
    assert set(loop.spoilt) == {(False, True, False)}
