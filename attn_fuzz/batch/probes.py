"""Known answers (attn_fuzz/oracle/known_answer) as batches ask for them: a verdict per document and result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import torch

from attn_fuzz.oracle.known_answer import KNOWN_ANSWERS
from attn_fuzz.oracle.known_answer.compared import KnownAnswer
from attn_fuzz.oracle.symptoms import Symptom
from attn_fuzz.reference.answer import KERNEL_TENSORS, Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

Results = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A question to every document of a call."""

    known: KnownAnswer
    documents: int
    """Of the call."""

    @property
    def inputs(self) -> Inputs:
        """The tensors of the call."""
        return self.known.inputs

    @property
    def symptoms(self) -> Mapping[str, type[Symptom]]:
        """What a result that fails is called."""
        return self.known.symptoms

    @property
    def backward(self) -> bool:
        """Whether gradients are looked at."""
        return self.known.backward

    def judge(self, results: Results) -> dict[str, torch.Tensor]:
        """From results to what is wrong with each of those that are looked at.

        Returns:
            bool ``[documents]``, or float64 in units in which the verdict is at LIMIT.
        """
        found: dict[str, torch.Tensor] = {}
        for compared in self.known.judge(results):
            wrong = compared.of_documents(self.documents)
            before = found.get(compared.tensor)
            found[compared.tensor] = wrong if before is None else torch.maximum(before, wrong)
        return found

    def deviations(self, results: Results) -> torch.Tensor:
        """float64 ``[documents, 5]`` as ``KERNEL_TENSORS``; inf where something exact is wrong."""
        z = torch.zeros(self.documents, len(KERNEL_TENSORS), dtype=torch.float64, device=self.inputs.q.device)
        for name, wrong in self.judge(results).items():
            of_result = torch.where(wrong, torch.inf, 0.0) if wrong.dtype == torch.bool else wrong
            z[:, KERNEL_TENSORS.index(name)] = of_result.double()
        return z


def _of(name: str) -> Callable[[Case, torch.device, Profile], Probe | None]:
    def probe(case: Case, device: torch.device, profile: Profile) -> Probe | None:
        known = KNOWN_ANSWERS[name](case, device, profile)
        return None if known is None else Probe(known, len(case.packed_lengths))

    return probe


PROBES: Final = {name: _of(name) for name in KNOWN_ANSWERS}
"""From a kernel case, a device and how a backend computes to what is asked; None where a case has none of the kind."""
