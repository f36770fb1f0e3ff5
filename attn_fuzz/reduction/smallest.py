"""From a case that failed to the smallest one found that fails in the same way."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.cases.order import simplicity, tokens
from attn_fuzz.cases.smaller import fewer_documents, one_shorter
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.oracle.checks import PROBES, RARE, Check
from attn_fuzz.oracle.checks.accumulation import exact_accumulation
from attn_fuzz.oracle.checks.regroup import regrouped, regrouped_case
from attn_fuzz.oracle.checks.repeat import repeats_itself
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.examine import Verdict, some_probes
from attn_fuzz.oracle.symptoms import MEMORY_SYMPTOMS, Crashed, Hung, NotExact, NotRepeatable, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.case import Case

_SECONDS: Final = 60.0

_ATTEMPTS: Final = 12
"""How often a smaller case is tried where the failing one, run once more, was right."""

_TIMES: Final = 3
_ASKED: Final = 8
_ASKING_SECONDS: Final = 20.0
"""How often all probes are asked of cases that are a document or a token smaller than the smallest, of how many, and
the seconds after which no more are asked."""

_LARGE: Final = 64
_OTHER_SEEDS: Final = range(4)
"""From so many tokens on a case whose budget is exceeded is asked with values of so many other seeds, too, for as long
as smaller ones are at most."""

_CONFIRMED: Final = 3
"""How often a smallest case has to fail again before it is believed that smaller ones do not."""

NOW_AND_THEN: Final = (
    "The same case, run once more, was right: a race, or something that earlier calls leave behind. Replay it several "
    "times."
)

_SMALL_EXCESS: Final = 10.0
"""Roundings of a few dozen sums reach that many times the limit at most; anything gross is what its budget says."""


_GROSS: Final = 100.0
"""Errors that no noise of quick budgets mimics: with 8 samples, once in 1e12 elements."""


class Examine(Protocol):
    """Gives a verdict on a case; raises UnsupportedCase for what the backend does not take."""

    def __call__(
        self,
        case: Case,
        poisons: Sequence[str] | None = None,
        probes: Sequence[Check] = PROBES,
        *,
        hasty: bool = False,
    ) -> Verdict: ...


@dataclasses.dataclass(frozen=True)
class Smallest:
    """What a failing case was shrunk to."""

    case: Case
    verdict: Verdict
    symptom: type[Symptom]
    always: bool
    """Whether the case that was drawn failed again when it was run once more."""
    first: tuple[str, Case] | None = None
    """Where a far smaller case fails in another way: what the failing case was seen by, and its smallest one."""

    def notes(self) -> tuple[str, ...]:
        """What a finding says beside its symptoms."""
        found = () if self.always else (NOW_AND_THEN,)
        if self.first is None:
            return found
        name, case = self.first
        return (
            *found,
            f"First seen as {name}, whose smallest case is {case.in_short()}; this far smaller one came up.",
        )


@dataclasses.dataclass(frozen=True)
class _Same:
    """What counts as failing in the same way, and what is asked to see it."""

    faces: tuple[type[Symptom], ...]
    probes: Sequence[Check]
    poisons: Sequence[str]
    clock: Callable[[], float] = time.process_time
    renamed: bool = False
    """Whether the smallest case's symptom, rather than that of the one that was drawn, names the finding."""


def _rounds_sums(trial: Trial, symptom: Symptom) -> bool:
    """Whether a small excess over the budget comes with sums of whole numbers that are no longer whole."""
    if trial.case.level != "layer" or symptom.z is None or symptom.z > _SMALL_EXCESS * LIMIT:
        return False
    try:
        return any(True for _ in exact_accumulation(trial))
    except UnsupportedCase:
        return False


def _same(trial: Trial, first: Symptom, probes: Sequence[Check]) -> _Same:
    """How to recognise the failure of a trial, whose first symptom that is and which these probes show."""
    symptom = type(first)
    if _rounds_sums(trial, first):
        # They leave the budget after many roundings only; whole numbers show it after two.
        return _Same((symptom, NotExact), (exact_accumulation,), trial.poisons, renamed=True)
    if "none" in trial.poisons and symptom in MEMORY_SYMPTOMS:
        # On memory as it comes a small case fails or passes by luck; poison shows what it would do on a bad day.
        return _Same(MEMORY_SYMPTOMS, probes, POISONS)
    if trial.case.all_ranks > 1 and symptom in (Crashed, Hung):
        # Ranks out of step wait for ever, or fall over what was meant for another: which of the two is chance. To wait
        # for those that hang takes no processor time.
        return _Same((Crashed, Hung), probes, trial.poisons, time.monotonic, renamed=True)
    return _Same((symptom,), probes, trial.poisons)


def _moves(verdict: Verdict) -> bool:
    """Whether two runs of one call gave other bits, beside whatever else is wrong: how wrong it is, is chance then."""
    return any(isinstance(symptom, NotRepeatable) for symptom in verdict.symptoms)


def _coming_and_going(same: _Same) -> _Same:
    """What fails now and then gives other bits the second time, which shows more surely."""
    return dataclasses.replace(
        same, faces=(*same.faces, NotRepeatable), probes=(*same.probes, repeats_itself), renamed=True
    )


@dataclasses.dataclass(frozen=True)
class _Again:
    """A failing case, run once more."""

    verdict: Verdict
    asked: Sequence[Check]
    """The probes that show it, the last of them if any: what earlier ones leave behind may be why."""
    attempts: int
    """How often a smaller case is tried."""
    always: bool
    """Whether it failed again after another call than before."""


def _alone(verdict: Verdict) -> Sequence[Check]:
    """Only what saw it is asked again; all the rest is once the case is small."""
    return () if verdict.first is None or verdict.first.probe is None else (verdict.first.probe,)


def _again(case: Case, verdict: Verdict, examine: Examine) -> _Again:
    # All probes may see something that names it better than those it was found by, but for one that is rarely asked.
    rare = [probe for probe in _alone(verdict) if probe in RARE]
    careful = examine(case, probes=rare) if rare else examine(case)
    if careful.first is not None:
        return _Again(careful, _alone(careful), 1, True)
    if _alone(verdict):
        probes = some_probes(case)
        found = examine(case, probes=probes)
        if found.first is not None and found.first.probe in probes and type(found.first) is type(verdict.first):
            return _Again(found, probes[: probes.index(found.first.probe) + 1], 1, False)
    return _Again(verdict, _alone(verdict), _ATTEMPTS, False)


def _nothing_where_refused(examine: Examine) -> Examine:
    """Refused is what a backend does not take, and what there is too little memory for by now, though it has failed."""

    def asked(
        case: Case, poisons: Sequence[str] | None = None, probes: Sequence[Check] = PROBES, *, hasty: bool = False
    ) -> Verdict:
        try:
            return examine(case, poisons, probes, hasty=hasty)
        except UnsupportedCase:
            return Verdict((), {}, frozenset())

    return asked


FAR: Final = 2
"""A case with so many times fewer tokens that fails in another way is what people would rather read."""


def smallest(trial: Trial, verdict: Verdict, examine: Examine) -> Smallest:
    """Shrinks a failing case to the end.

    What is smaller must fail in the same way, so that shrinking does not pass from one mistake to another. Where a far
    smaller case fails in another way, it is most often the same mistake: that one is shrunk, too, and comes instead.

    Args:
        trial: of the case, under the poisons under which it failed.
        verdict: why it did.
        examine: gives further verdicts.
    """
    others: list[Case] = []
    examine = _nothing_where_refused(examine)
    found = _alike(trial, verdict, examine, others)
    for _ in range(_TIMES):
        if (smaller := _seen_otherwise(trial, found, examine)) is None:
            break
        found = smaller
    found = _seen_by_other_values(trial, found, examine)
    for other in sorted(set(others), key=lambda each: (tokens(each), simplicity(each)))[:1]:
        if FAR * tokens(other) > tokens(found.case):
            break
        careful = examine(other, trial.poisons)
        if careful.first is not None and type(careful.first) is not found.symptom:
            smaller = _alike(dataclasses.replace(trial, case=other), careful, examine, [])
            return dataclasses.replace(smaller, first=(found.symptom.__name__, found.case))
    return found


def _seen_otherwise(trial: Trial, found: Smallest, examine: Examine) -> Smallest | None:
    """A smaller case in which other probes see the same, shrunk by those; None where the smallest stands.

    Only what had seen it was asked on the way, and what fails ten keys by their budget may fail one that is pointed at.
    """
    if found.symptom in (Crashed, Hung):
        return None
    started = time.monotonic()
    candidates = itertools.chain(fewer_documents(found.case), one_shorter(found.case))
    for case in itertools.islice((each for each in candidates if each is not None), _ASKED):
        if time.monotonic() - started > _ASKING_SECONDS:
            return None
        verdict = examine(case, trial.poisons)
        if type(verdict.first) is found.symptom:
            smaller = _alike(dataclasses.replace(trial, case=case), verdict, examine, [])
            return dataclasses.replace(smaller, always=found.always) if smaller.symptom is found.symptom else None
    return None


def _seen_by_other_values(trial: Trial, found: Smallest, examine: Examine) -> Smallest:
    """What probes make of the case, drawn or shrunk, where its values are within the budget, if that is far smaller.

    Roundings that add up leave the budget after hundreds of keys, and with some values only. Where they do, no probe
    is asked, and one whose sums are exact tells after two tiles.
    """
    first = found.verdict.first
    if tokens(found.case) < _LARGE or found.symptom in (Crashed, Hung) or first is None or first.probe is not None:
        return found
    started = time.monotonic()
    # What was drawn has more channels and heads, what was shrunk fewer options that probes do not know.
    for case in (each.replace(seed=seed) for each in (trial.case, found.case) for seed in _OTHER_SEEDS):
        if time.monotonic() - started > _ASKING_SECONDS:
            break
        verdict = examine(case, trial.poisons)
        if verdict.first is not None and verdict.first.probe is not None:
            smaller = _alike(dataclasses.replace(trial, case=case), verdict, examine, [])
            if FAR * tokens(smaller.case) <= tokens(found.case):
                return dataclasses.replace(smaller, first=(found.symptom.__name__, found.case))
            return found
    return found


def _alike(trial: Trial, verdict: Verdict, examine: Examine, others: list[Case]) -> Smallest:
    """The smallest case that fails in the same way; those that fail in another one are added to ``others``."""
    case = trial.case
    again = _again(case, verdict, examine)
    best, asked = again.verdict, again.asked
    if best.first is not None and best.first.probe is regrouped and (other := regrouped_case(case)) is not None:
        # The case passes and another arrangement of it fails: that one is the finding, if it fails by itself.
        moved = examine(other)
        if moved.first is not None and moved.first.probe is not regrouped:
            case, best, asked = other, moved, _alone(moved)
    drawn, first = best, best.first
    assert first is not None
    symptom = type(first)
    same = _same(dataclasses.replace(trial, case=case), first, asked)
    if _moves(drawn):
        same = _coming_and_going(same)

    def fails_once(candidate: Case, *, hasty: bool) -> bool:
        nonlocal best
        found = examine(candidate, same.poisons, same.probes, hasty=hasty)
        if type(found.first) not in same.faces:
            if found.first is not None:
                others.append(candidate)
            return False
        best = found
        return True

    attempts = again.attempts

    def shrunk(*, hasty: bool) -> Case:
        def fails(candidate: Case) -> bool:
            return any(fails_once(candidate, hasty=hasty) for _ in range(attempts))

        multiple = trial.backend.kernel.capabilities_on(trial.device.type).slice_multiple
        return minimise(case, fails, _SECONDS, same.clock, multiple=multiple)

    # Careful budgets take more than nine tenths of the time of a layer that fails.
    hasty = case.level == "layer" and (first.z is None or first.z > _GROSS)
    small = shrunk(hasty=hasty)
    costly = symptom in (Crashed, Hung)
    confirmed = attempts > 1 or costly or all(fails_once(small, hasty=hasty) for _ in range(_CONFIRMED))
    if not confirmed or (not costly and _moves(best) and NotRepeatable not in same.faces):
        # It comes and goes, and what is smaller may have passed by chance.
        case, attempts, same = small, _ATTEMPTS, _coming_and_going(same)
        small = shrunk(hasty=hasty)
    whole = examine(small, same.poisons)
    if hasty and again.always and type(whole.first) not in same.faces:
        best = drawn
        small = shrunk(hasty=False)
        whole = examine(small, same.poisons)
    best = whole if type(whole.first) is symptom else best
    if same.renamed and best.first is not None:
        symptom = type(best.first)
    return Smallest(small, best, symptom, always=again.always)
