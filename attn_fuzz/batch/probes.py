"""What is asked of many documents at once with inputs made for it: adding a probe is one function, listed here.

Each is the probe of the same name that the case mode asks one case at a time (attn_fuzz/checks), with its numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Final

import torch

from attn_fuzz.batch.census import SYMPTOMS, keys_probe, wrong_documents
from attn_fuzz.batch.every_row import every_row_inputs, miscounted
from attn_fuzz.batch.needle import needle_inputs
from attn_fuzz.batch.swamping import swamped_sums, swamping_inputs
from attn_fuzz.batch.verdicts import of_documents
from attn_fuzz.oracle.checks.exact import lost_needles
from attn_fuzz.oracle.known_answer.slack import in_fp16, needle_slack, stores_dq, weight_error
from attn_fuzz.oracle.symptoms import NotExact, Symptom, WrongKeys, WrongKeysBackward
from attn_fuzz.reference.answer import KERNEL_TENSORS, Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

Results = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A question to every document of a call."""

    inputs: Inputs
    judge: Callable[[Results], dict[str, torch.Tensor]]
    """From results to what is wrong with each of those that the probe looks at: bool ``[documents]``, or float64 in
    units in which the verdict is at LIMIT."""
    symptoms: Mapping[str, type[Symptom]]
    """What a result that fails is called."""
    backward: bool = True
    """Whether gradients are looked at."""

    def deviations(self, results: Results) -> torch.Tensor:
        """float64 ``[documents, 5]`` as ``KERNEL_TENSORS``; inf where something exact is wrong."""
        found = self.judge(results)
        some = next(iter(found.values()))
        z = torch.zeros(len(some), len(KERNEL_TENSORS), dtype=torch.float64, device=some.device)
        for name, wrong in found.items():
            of_result = torch.where(wrong, torch.inf, 0.0) if wrong.dtype == torch.bool else wrong
            z[:, KERNEL_TENSORS.index(name)] = of_result.double()
        return z


def keys(case: Case, device: torch.device, profile: Profile) -> Probe:
    """Census and support: which keys took part, forward and backward."""
    probe = keys_probe(case, device, fp16=in_fp16(case, profile))

    def judge(results: Results) -> dict[str, torch.Tensor]:
        return dict(zip(KERNEL_TENSORS, wrong_documents(case, probe, results, profile).unbind(1), strict=True))

    return Probe(probe.inputs, judge, SYMPTOMS)


def needle(case: Case, device: torch.device, profile: Profile) -> Probe | None:
    """Every row points at one key, whose value comes out to the last bit."""
    slack = needle_slack(case, profile)
    if not math.isfinite(slack) or (probe := needle_inputs(case, device)) is None:
        return None
    symptoms = {"out": WrongKeys}

    def judge(results: Results) -> dict[str, torch.Tensor]:
        lost = lost_needles(case, probe, results["out"], slack)
        return {"out": of_documents(case, "out", lost.any(1))}

    return Probe(probe.inputs, judge, symptoms, backward=False)


def every_row(case: Case, device: torch.device, profile: Profile) -> Probe:
    """A gradient in every row: a key that a single one drops, adds or swaps moves dV by about 1."""
    inputs = every_row_inputs(case, device)
    symptoms = {"dv": WrongKeysBackward}
    return Probe(inputs, lambda results: {"dv": miscounted(case, inputs, profile, results["dv"])}, symptoms)


def swamping(case: Case, device: torch.device, profile: Profile) -> Probe | None:
    """Sums of small numbers beside large ones that cancel."""
    if (probe := swamping_inputs(case, device)) is None:
        return None
    stored, error = stores_dq(case, profile), weight_error(case, profile)

    def judge(results: Results) -> dict[str, torch.Tensor]:
        found = swamped_sums(case, probe, results, error)
        return {"out": found["out"]} if stored else found

    return Probe(probe.inputs, judge, {"out": NotExact, "dq": NotExact})


PROBES: Final[dict[str, Callable[[Case, torch.device, Profile], Probe | None]]] = {
    "keys": keys,
    "needle": needle,
    "every row": every_row,
    "swamping": swamping,
}
