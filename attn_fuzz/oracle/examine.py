"""The verdict on one case: run it under both poisons, compute the answer, ask every check."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, Final, ParamSpec, TypeVar

import torch

from attn_fuzz.backends.kernel import Capabilities, UnsupportedCase
from attn_fuzz.backends.known import KnownIssue, built_on, issues_below, issues_of
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.backends.registry import Backend, calls_of
from attn_fuzz.backends.user import InsideLayer, UserKernel
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.operators import operators_of
from attn_fuzz.execution.origin import place_of
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.execution.process import device_failed, first_line, in_words, kind_of, raise_lack_of_memory
from attn_fuzz.execution.runner import WroteBeforeRefusing, require_support
from attn_fuzz.oracle.checks import CHECKS, PROBES, RARE, Check, histograms, worst_errors, worst_spreads
from attn_fuzz.oracle.known_issues import explains
from attn_fuzz.oracle.second_opinion import confirm
from attn_fuzz.oracle.symptoms import Crashed, Hung, InputsChanged, MissingResult, Symptom, wrong_tensor
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.ranks.rank_group import RanksHung
from attn_fuzz.reference.case import FAR_MEMORIES, Case


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the checks said."""

    symptoms: tuple[Symptom, ...]
    """In order of rank; empty for a clean case."""
    worst_z: dict[str, float]
    """Largest error per tensor in budget standard deviations."""
    paths: frozenset[str]
    histograms: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Elements by z (attn_fuzz/oracle/checks/budget.py) of a clean kernel case."""
    known: tuple[str, ...] = ()
    """Known issues (backends/known.py) that explain symptoms left out of ``symptoms``."""
    counted: dict[str, int] = dataclasses.field(default_factory=dict)
    """How often something was asked of which there is a count, and how it went."""

    @property
    def first(self) -> Symptom | None:
        """The symptom that names the finding."""
        return self.symptoms[0] if self.symptoms else None

    @property
    def checks(self) -> tuple[str, ...]:
        """Names of the checks that failed, in order of rank."""
        return tuple(dict.fromkeys(symptom.check for symptom in self.symptoms))


def some_probes(case: Case, only: Sequence[Check] = ()) -> Sequence[Check]:
    """A quarter of the probes, other ones for every case: a campaign would rather see more cases.

    A fifth of them where a case is spread over ranks, all of which take part in every run of each; and none of a
    crowd of documents, which is about how they are counted: a probe of it takes as long as some ten cases.

    Args:
        case: that is asked.
        only: what is asked of every case instead, if anything.
    """
    if only:
        return only
    if len(case.lengths) >= _CROWD:
        return ()
    share, number = _SHARES[case.all_ranks > 1], zlib.crc32(case.to_json().encode())
    rare = RARE if number // share % _RARELY == 0 else ()
    return [*(probe for index, probe in enumerate(PROBES) if index % share == number % share), *rare]


_SHARES: Final = (4, 5)
"""One probe in so many is asked of a case, and of one over ranks: as many as before there were those of axes (about
four), so that a case takes as long as it did then."""

_CROWD: Final = 1 << 14

_RARELY: Final = 1024
"""One case in so many is asked what takes seconds."""


P = ParamSpec("P")
_Of = TypeVar("_Of")


def _giving_back(judge: Callable[Concatenate[Case, P], Verdict]) -> Callable[Concatenate[Case, P], Verdict]:
    """Gigabytes of a GPU's memory go back to those who share it, once nothing refers to the case's tensors."""

    @functools.wraps(judge)
    def judged(case: Case, *args: P.args, **options: P.kwargs) -> Verdict:
        try:
            return judge(case, *args, **options)
        finally:
            if case.memory in FAR_MEMORIES and torch.cuda.is_initialized():
                # Where a call has taken the context with it there is nothing to give back.
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()

    return judged


def _symptoms(trial: Trial, probes: Sequence[Check]) -> Iterator[Symptom]:
    """What the checks say, and the probes where those say nothing."""
    seen = False
    for check in CHECKS:
        for symptom in check(trial):
            seen = True
            yield symptom
    for probe in probes if not seen else ():
        for symptom in _asked(probe, trial):
            symptom.probe = probe
            yield symptom


@_giving_back
def examine(
    case: Case,
    backend: Backend,
    device: torch.device | str,
    poisons: Sequence[str] = POISONS,
    *,
    probes: Sequence[Check] = PROBES,
    hasty: bool = False,
) -> Verdict:
    """Runs a case and asks every check.

    Args:
        case: what to run.
        backend: on what.
        device: where.
        poisons: contents of unwritten memory, one run each.
        probes: which checks with runs of their own to ask.
        hasty: judge layers by quick budgets, which may accuse wrongly.

    Raises:
        UnsupportedCase: when the backend declares that it does not take the case.
        ReferencesDisagree: when a second opinion has it that the mistake is the harness's.
    """
    device = torch.device(device)
    require_support(backend, case, device)
    trial = Trial(case, backend, device, poisons, hasty=hasty)
    if case.level == "kernel" and case.capacity and not trial.inferred.capacity:
        raise UnsupportedCase(f"{backend.name} does not take rows beyond the last document")
    observations = _observed(trial)
    if isinstance(observations, Symptom):
        return Verdict((observations,), {}, frozenset())

    try:
        found = sorted(_symptoms(trial, probes), key=lambda symptom: symptom.rank)
    except (Symptom, UnsupportedCase):
        raise
    except Exception as error:
        # The second value seed runs while the checks do, and a backend may fall over that one only.
        raise_lack_of_memory(error)
        found = [_fallen(error)]
    paths = frozenset().union(*(o.paths for o in observations))
    unknown, known = _without_known(found, trial)
    confirm(trial, unknown)
    return Verdict(
        tuple(unknown),
        its_own(trial.stated, worst_errors(trial) | worst_spreads(trial)),
        paths,
        {} if found else its_own(trial.stated, histograms(trial)),
        known,
        dict(trial.counted),
    )


def its_own(stated: Capabilities, by_result: dict[str, _Of]) -> dict[str, _Of]:
    """What is said of results, by their names, without gradients where they are not the backend's."""
    if stated.backward:
        return by_result
    return {name: of for name, of in by_result.items() if not name.startswith("d")}


def _observed(trial: Trial) -> tuple[Observation, ...] | Symptom:
    """The runs that every case makes, or what is wrong where they do not come back.

    Raises:
        UnsupportedCase: when the backend refuses, by a typed error or by one that an unusual memory layout makes.
    """
    try:
        return trial.observations
    except UnsupportedCase:
        raise
    except WroteBeforeRefusing as error:
        return InputsChanged("reject_or_correct", "inputs", str(error))
    except (Exception, AssertionError) as error:
        raise_lack_of_memory(error)
        if _refuses_layout(trial, error):
            raise UnsupportedCase(
                f"{trial.backend.name} does not take memory layout {trial.case.memory}: {first_line(error)}"
            ) from None
        return _fallen(error)


def tried(case: Case, backend: Backend, device: torch.device | str) -> Verdict:
    """Whether a case runs at all, by itself and once: it comes back, and not with NaN. No answer is computed.

    Args:
        case: without rows that see no key.
        backend: on what.
        device: where.

    Raises:
        UnsupportedCase: when the backend refuses the case, by declaration or by itself.
    """
    device = torch.device(device)
    require_support(backend, case, device)
    observations = _observed(Trial(case, backend, device, POISONS[:1], interfered=False))
    if isinstance(observations, Symptom):
        return Verdict((observations,), {}, frozenset())
    nan = [name for name, got in observations[0].results.items() if got.isnan().any()]
    found = tuple(wrong_tensor(name)("runs", name, "it is NaN", nan=True) for name in nan[:1])
    return Verdict(found, {}, observations[0].paths)


def _asked(probe: Check, trial: Trial) -> Iterator[Symptom]:
    """A probe's symptoms; a backend that falls over its runs only is found again by asking it again."""
    before = len(trial.touched)
    try:
        yield from probe(trial)
        for what in dict.fromkeys(trial.touched[before:]):
            yield InputsChanged("inputs_intact", what, "its bits changed in a run for another check")
    except (Symptom, UnsupportedCase):
        raise
    except Exception as error:
        raise_lack_of_memory(error)
        yield _fallen(error)


def _without_known(found: Sequence[Symptom], trial: Trial) -> tuple[list[Symptom], tuple[str, ...]]:
    """Symptoms that no known issue explains, and the ids of those that explain the others."""
    if not found:
        return [], ()
    issues = (*issues_of(trial.backend.name, trial.device.type, trial.case, calls_of(trial.case)), *_below(trial))
    unknown, known = [], dict[str, None]()
    for symptom in found:
        explained = [issue.id for issue in issues if explains(issue, symptom)]
        known |= dict.fromkeys(explained[:1])
        if not explained:
            unknown.append(symptom)
    return unknown, tuple(known)


def _below(trial: Trial) -> tuple[KnownIssue, ...]:
    """Known issues of torch's operators that a user's kernel or layer runs, in cases that they cover."""
    if not isinstance(trial.backend.kernel, (UserKernel, InsideLayer)):
        return ()
    issues = issues_below(trial.device.type, trial.case, calls_of(trial.case))
    if not issues:
        return ()
    try:
        _, operators = operators_of(lambda: trial.observe(trial.poisons[0]))
    except Exception as error:
        raise_lack_of_memory(error)
        return ()
    return tuple(issue for issue in issues if built_on(issue, operators))


def _refuses_layout(trial: Trial, error: BaseException) -> bool:
    """Whether an ordinary error about an unusual memory layout goes away with the layout: a clean refusal."""
    case = trial.case
    if case.level != "kernel" or case.memory in USUAL_MEMORIES or device_failed(error):
        return False
    try:
        dataclasses.replace(trial, case=case.replace(memory="contiguous")).observe(trial.poisons[0])
    except Exception:
        return False
    return True


USUAL_MEMORIES = ("contiguous", "fused", "head_major", "sliced", "mixed")
"""Layouts that a varlen kernel meets every day, or a mixture of them; on these an error is a finding."""


def _fallen(error: BaseException) -> Symptom:
    """The symptom of a call that did not come back as it should."""
    if isinstance(error, MisshapenResult):
        return MissingResult("complete", "out", first_line(error))
    words = f"{in_words(error)}{place_of(error)}"
    if isinstance(error, RanksHung):
        return Hung("runs", "call", words)
    crashed = Crashed("runs", "call", words)
    crashed.error = kind_of(error)
    return crashed
