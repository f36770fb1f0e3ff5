"""Alone or in company (oracle/relations/company.py), asked of one document of a case and told in a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.execution.inferred import promises
from attn_fuzz.execution.runner import require_support
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.relations.company import PASSES, Pack, alone, asked_of, chosen, counted, packs, promised
from attn_fuzz.oracle.symptoms import Element, NotBatchInvariant, Place, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.memory import bits, same_bits


class _Run(NamedTuple):
    """A pack, and what it gave."""

    pack: Pack
    trial: Trial
    results: dict[str, torch.Tensor]


def same_in_company(trial: Trial) -> Iterator[Symptom]:
    """A document by itself, in its call, and in another order or a crowd: the same bits where promised, else budget."""
    case, layouts = trial.case, bool(trial.stated.layouts)
    if not asked_of(case, trial.backend, trial.device.type):
        return
    place = chosen(case, layouts=layouts)
    first = None if place is None else alone(case, place)
    if place is None or first is None or not _taken(trial, first):
        return
    here = Pack(case, place)
    others = [_run(trial, pack) for pack in packs(case, place, layouts=layouts) if _taken(trial, pack)]
    runs = [_run(trial, first), _Run(here, trial, trial.observations[0].results), *others]
    _count(trial, runs)
    for name, expected in trial.answer.items():
        for run in runs[1:]:
            if promised(trial.stated, name) and (symptom := _moved(name, runs[0], run)) is not None:
                yield symptom
                break
        else:
            yield from _beyond_budget(trial, here, name, expected, [run for run in runs if run.trial is not trial])


def _taken(trial: Trial, pack: Pack) -> bool:
    try:
        require_support(trial.backend, pack.case, trial.device)
    except UnsupportedCase:
        return False
    return True


def _run(trial: Trial, pack: Pack) -> _Run:
    own = dataclasses.replace(trial, case=pack.case)
    return _Run(pack, own, own.observe(trial.poisons[0]).results)


def _count(trial: Trial, runs: list[_Run]) -> None:
    """How often a document is the same, of results that are the same in every run of one call."""
    for which, names in PASSES.items():
        own = [[run.pack.own(run.results, name) for run in runs] for name in names if trial.repeats(name)]
        there = [[x for x in parts if x is not None] for parts in own]
        if any(len(parts) > 1 for parts in there):
            trial.counted[counted(which)] += 1
            trial.counted[counted(which, moved=True)] += any(
                not same_bits(parts[0], x) for parts in there for x in parts[1:]
            )


def _moved(name: str, first: _Run, second: _Run) -> Symptom | None:
    """The symptom of a result with other bits in company, and not by chance."""
    trial = first.trial
    before, after = (run.pack.own(run.results, name) for run in (first, second))
    if before is None or after is None or before.shape != after.shape or same_bits(before, after):
        return None
    if not trial.repeats(name):
        return None
    if not promises(trial.backend, str(trial.device), name) and any(
        run.trial.moves_by_itself(name) for run in (first, second)
    ):
        return None
    differs = bits(before) != bits(after)
    at = tuple(int(i) for i in differs.nonzero()[0])
    element = Element(Place(second.pack.place, *at), after[at].item(), before[at].item())
    moved = (after.double() - before.double()).abs()[differs].nan_to_num(torch.inf).max().item()
    return NotBatchInvariant(
        "company",
        name,
        f"{element.place} gives {element.expected:.9g} alone and {element.got:.9g} in company, among "
        f"{_listed(second.pack)}: {int(differs.sum())} elements moved, by up to {moved:.3g}",
        element=element,
    )


def _listed(pack: Pack) -> str:
    queries, keys = pack.case.packed_lengths, pack.case.packed_key_lengths
    few = [f"{q}/{k}" for q, k in zip(queries, keys, strict=True)][:8]
    return f"documents of {', '.join(few)}{', ...' if len(queries) > len(few) else ''} queries/keys"


def _beyond_budget(trial: Trial, here: Pack, name: str, expected: Expected, runs: list[_Run]) -> Iterator[Symptom]:
    """A document that is right in its own call, and beyond its budget in another one, under two value seeds."""
    if _off(_Run(here, trial, trial.observations[0].results), here, name, expected) is not None:
        # Wrong in whatever company: others say so.
        return
    for run in runs:
        if (symptom := _off(run, here, name, expected)) is None:
            continue
        second = trial.second
        again = dataclasses.replace(run.pack, case=run.pack.case.replace(seed=second.case.seed))
        there = Pack(second.case, here.place)
        if _off(_run(second, again), there, name, second.answer[name]) is not None:
            yield symptom
            return


def _off(run: _Run, here: Pack, name: str, expected: Expected) -> Symptom | None:
    rows, got = here.rows(name), run.pack.own(run.results, name)
    own = Expected(expected.value[rows], expected.variance[rows])
    if got is None or got.shape != own.value.shape or not got.numel():
        return None
    z = deviations(run.pack.case, got, own)
    if z.max() > limit(run.pack.case):
        # Other calls may have other sums (reference/sums.py): a budget of its own settles it.
        answer, rows = run.trial.answer[name], run.pack.rows(name)
        own = Expected(answer.value[rows], answer.variance[rows])
        z = deviations(run.pack.case, got, own)
    if not z.max() > limit(run.pack.case):
        return None
    at = tuple(int(i) for i in torch.unravel_index(z.argmax(), z.shape))
    element = Element(Place(run.pack.place, *at), got[at].item(), own.value[at].item())
    message = (
        f"among {_listed(run.pack)}, {element.place}: got {element.got:.6g}, expected {element.expected:.6g}, "
        f"z = {z.max().item():.3g}"
    )
    return NotBatchInvariant("company", name, message, z=z.max().item(), element=element)
