"""Which elements of a finding's results are wrong, and which keys its rows may see: what a picture shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.runner import run_kernel
from attn_fuzz.findings.scripts.kernel import candidates
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.trial import SECOND_SEED, Trial
from attn_fuzz.reference.answer import Expected, kernel_answer
from attn_fuzz.reference.attention import allowed_keys
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import document_spans

OF_ROWS: Final[tuple[str, ...]] = ("out", "lse", "dq", "dx")
"""Results that have a row for each query."""

OF_KEYS: Final[tuple[str, ...]] = ("k", "v", "dk", "dv")
"""And for each key."""


@dataclasses.dataclass(frozen=True)
class FailingSet:
    """Of one run of a case."""

    case: Case
    wrong: Mapping[str, torch.Tensor]
    """bool ``[rows or keys, heads, channels]`` of every result that has rows, also those that are right; a layer's
    outputs have one head."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the results that are wrong."""
        return tuple(name for name, mask in self.wrong.items() if bool(mask.any()))

    def seen(self) -> torch.Tensor:
        """bool ``[rows, keys]``: which keys a row may see."""
        case = self.case
        found = torch.zeros(sum(case.packed_lengths), sum(case.packed_key_lengths), dtype=torch.bool)
        spans = zip(document_spans(case.packed_lengths), document_spans(case.packed_key_lengths), strict=True)
        for rows, keys in spans:
            found[slice(*rows), slice(*keys)] = allowed_keys(
                rows.length, keys.length, case.effective_window, torch.device("cpu")
            )
        return found


def failing_set(case: Case, backend: Backend, device: torch.device) -> FailingSet | None:
    """The elements beyond their budgets, with the first values that show any; None where none do.

    Args:
        case: that fails, and comes back.
        backend: that fails it.
        device: where.
    """
    for found in _tried(case, backend, device):
        if found.tensors:
            return found
    return None


def _tried(case: Case, backend: Backend, device: torch.device) -> Iterator[FailingSet]:
    """With values after values: those that were drawn, then others."""
    if case.level == "kernel":
        profile = backend.kernel.profile_on(device.type)
        for inputs in candidates(case, profile):
            results = run_kernel(backend, case, inputs, "nan", device).results
            answer = kernel_answer(case, inputs, profile)
            yield _of(case, {name: (results[name], each) for name, each in answer.items() if name in results})
        return
    for seed in (case.seed, case.seed ^ SECOND_SEED):
        trial = Trial(case.replace(seed=seed), backend, device, ("nan",), interfered=False)
        results = trial.observations[0].results
        yield _of(case, {name: (results[name], each) for name, each in trial.careful_answer.items() if name in results})


def _of(case: Case, pairs: Mapping[str, tuple[torch.Tensor, Expected]]) -> FailingSet:
    wrong = {}
    for name, (got, expected) in pairs.items():
        if name not in (*OF_ROWS, *OF_KEYS) or got.shape != expected.value.shape:
            continue
        mask = deviations(case, got, expected) > limit(case)
        # The LSE has no channels, and a layer's output no heads.
        wrong[name] = mask[..., None] if name == "lse" else mask[:, None] if mask.dim() == 2 else mask
    return FailingSet(case, wrong)
