"""Merging (oracle/relations/merged.py): the keys in two calls come to the same as in one, told in a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from attn_fuzz.oracle.known_answer.compared import Compared
from attn_fuzz.oracle.relations.autograd import INFERENCE
from attn_fuzz.oracle.relations.merged import MERGED, PART_RESULTS, Parts
from attn_fuzz.oracle.symptoms import NotMerged, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.batched import kernel_answer


def parts_merge(trial: Trial) -> Iterator[Symptom]:
    """Two parts of the keys, merged by their LSEs, within the budget; a part without keys moves no bit of the other."""
    parts = parts_of(trial)
    if parts is None:
        return
    found = _wrong(trial, parts)
    trial.counted[MERGED] += 1
    if not found:
        return
    second = trial.second
    again = _wrong(second, dataclasses.replace(parts, whole=second.case))
    for name, compared in found.items():
        if name not in again and not compared.beyond.isinf().any():
            continue
        wrong = compared.first()
        assert wrong is not None
        element, z = wrong.element, compared.beyond[wrong.index].item()
        first, other = (list(case.packed_key_lengths) for case in parts.cases)
        yield NotMerged(
            "merging",
            name,
            f"over {first} and {other} keys, merged by their LSEs, {element.place}: got {element.got:.6g}, expected "
            f"{element.expected:.6g}, z = {z:.3g}",
            z=z,
            element=element,
        )


def parts_of(trial: Trial) -> Parts | None:
    """The parts of a trial's keys, where the backend gives an LSE and takes both."""
    if "lse" not in trial.observations[0].results:
        return None
    return Parts.taken(trial.case, trial.backend, trial.device.type)


def _wrong(trial: Trial, parts: Parts) -> dict[str, Compared]:
    """Merged results with something wrong, by name."""
    assert isinstance(trial.inputs, Inputs)
    results, answers = list[dict[str, torch.Tensor]](), list[dict[str, Expected]]()
    for case, inputs in zip(parts.cases, parts.inputs(trial.inputs), strict=True):
        part = dataclasses.replace(trial, case=case)
        results.append(part.observe_with(inputs, trial.poisons[0], asked=INFERENCE).results)
        answers.append(kernel_answer(case, inputs, trial.profile, degrees=False))
    if any(name not in got for got in results for name in PART_RESULTS):
        return {}
    return {each.tensor: each for each in parts.compared(results, [*answers, trial.answer]) if each.wrong.any()}
