"""Isolation (oracle/relations/isolation.py), asked of one case and told in a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import torch

from attn_fuzz.execution.observation import Observation
from attn_fuzz.oracle.garbage import kernel_garbage, layer_garbage
from attn_fuzz.oracle.known_answer.compared import Compared
from attn_fuzz.oracle.relations.isolation import Spoiled, far_apart, garbage_of, kept_documents, moved_bits
from attn_fuzz.oracle.symptoms import NotIsolated, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case

_CPU: Final = torch.device("cpu")
"""Where all checks run (oracle/trial.py)."""


def documents_apart(trial: Trial) -> Iterator[Symptom]:
    """Other documents are filled with garbage: those that keep their values keep all their results."""
    case, inputs = trial.case, trial.inputs
    if len(case.packed_lengths) < 2:
        return
    finite = kernel_garbage(case) if isinstance(inputs, Inputs) else layer_garbage(case, inputs)
    garbage = garbage_of(case, trial.inferred, finite)
    tensors = "q, k, v and dout" if case.level == "kernel" else "x and dout"
    what = f"other documents' values ({garbage:g} in {tensors} of documents {_listed(case)})"
    yield from _judged(trial, Spoiled.documents(case, _CPU, garbage), what)


def future_apart(trial: Trial) -> Iterator[Symptom]:
    """Keys that earlier rows do not see are filled with garbage: those rows keep their output and dQ."""
    if trial.case.level != "kernel":
        return
    garbage = kernel_garbage(trial.case)
    spoiled = Spoiled.future(trial.case, _CPU, garbage)
    if spoiled is None or not spoiled.rows.any() or spoiled.key_rows.all():
        return
    what = f"keys that it does not see ({garbage:g} in k and v there, and in q and dout of later rows)"
    yield from _judged(trial, spoiled, what)


def _listed(case: Case) -> str:
    """The documents that are not kept, the first few."""
    kept = frozenset(kept_documents(case))
    others = [index for index in range(len(case.packed_lengths)) if index not in kept]
    return ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")


def _judged(trial: Trial, spoiled: Spoiled, what: str) -> Iterator[Symptom]:
    """What moved in rows that had to stay."""
    drawn = trial.inputs
    inputs = spoiled.inputs(drawn) if isinstance(drawn, Inputs) else spoiled.layer_inputs(drawn)

    def run() -> Observation:
        return trial.observe_with(inputs, trial.poisons[0])

    before, after = trial.observations[0].results, run().results
    for name in spoiled.results:
        if not spoiled.fits(name, before, after):
            continue
        pair = before[name], after[name]
        # Layers hold matrix products over all tokens, whose rounding is torch's affair.
        exact = trial.repeats(name) and trial.case.level == "kernel"
        compared = spoiled.compared(
            name, *pair, moved_bits(*pair) if exact else far_apart(*pair, trial.answer[name].variance)
        )
        if exact and compared.wrong.any() and not trial.moves_for(name, run):
            compared = spoiled.compared(name, *pair, far_apart(*pair, trial.answer[name].variance))
        yield from _told(trial, compared, what)


def _told(trial: Trial, compared: Compared, what: str) -> Iterator[Symptom]:
    """What a comparison is about, in a sentence."""
    if (wrong := compared.first()) is None:
        return
    element, rows = wrong.element, int(compared.wrong.flatten(1).any(1).sum())
    if trial.case.level == "layer" and compared.got.dim() == 2:
        # Channels of all heads together.
        place = dataclasses.replace(element.place, head=None, channel=element.place.head)
        element = dataclasses.replace(element, place=place)
    moved = (compared.got.double() - compared.expected.double()).abs()[compared.wrong]
    yield NotIsolated(
        "isolation",
        compared.tensor,
        f"{element.place} changes with {what}, from {element.expected:.6g} to {element.got:.6g}: {rows} such rows, "
        f"by up to {moved.nan_to_num(torch.inf).max().item():.3g}",
        element=element,
    )
