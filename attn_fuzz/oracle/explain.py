"""Whether one fact about a kernel's arithmetic, if it were declared, would explain what it is accused of.

A kernel that multiplies in TF32 or adds up in half precision is not wrong, only other than was assumed. What it gives
is held to the budget of each single fact that its profile lacks, on the failing case and on larger ones. A fact
explains it where everything is well within that budget and everything else about these cases is clean; of several
facts, the one under whose budget the errors are the likeliest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends.arithmetic import KEY
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import InsideLayer, UserKernel
from attn_fuzz.oracle.deviations import LIMIT, deviations, limit
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.facts import Fact, all_facts, declaring, loosens
from attn_fuzz.oracle.second_value import of_another_meaning
from attn_fuzz.oracle.symptoms import (
    WRONG_TENSOR,
    NotExact,
    NotRegrouped,
    Symptom,
    WrongKeys,
    WrongKeysBackward,
    WrongParameterGradient,
    WrongSpread,
    WrongWhenAsked,
)
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected, kernel_inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.monte_carlo import SAMPLES
from attn_fuzz.reference.narrow import Narrow
from attn_fuzz.reference.profile import Profile

_PLAUSIBLE: Final = 6.5
"""Largest z of what a fact explains: below the verdict's limit by what the margin there is for."""

_VAGUE: Final = 0.8
"""z of layers, whose budgets are themselves drawn, in units of those of kernels."""

BY_VALUE: Final = (
    *WRONG_TENSOR.values(),
    WrongParameterGradient,
    WrongSpread,
    WrongKeys,
    WrongKeysBackward,
    NotRegrouped,
    NotExact,
    WrongWhenAsked,
)
"""Symptoms that are a matter of how near a number is: nothing else is explained by arithmetic."""

_SYSTEMATIC: Final = 8.0
"""Standard errors by which a result as a whole may be too large or too small: roundings have no preference."""

_SECONDS: Final = 120.0
"""After that a case is too large to be explained."""

_STEP: Final = 2.0**-10
"""Relative change of the softmax scale by which its effect is measured."""

_FAR_MORE: Final = 10.0
_FAR_LESS: Final = 0.03
"""Mean z^2 under a fact that is none: TF32 that is rounded, and not cut off, has a quarter of its budget's variance."""

_TELLING: Final = 64
"""Elements whose mean z^2 says something."""


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How a fact fits what came out."""

    fact: Fact
    z: float
    """Largest, in units in which the verdict is at LIMIT."""
    likelihood: float
    """Logarithm, of all errors as independent normal numbers, but for a constant that all facts have in common."""


def suggestion(trial: Trial, small: Case, announce: Callable[[Case], None]) -> str | None:
    """What a finding about user code says of its arithmetic, if that explains it.

    Args:
        trial: of the case that failed first.
        small: what it was shrunk to.
        announce: as of ``explained_by``.
    """
    if not isinstance(trial.backend.kernel, (UserKernel, InsideLayer)):
        return None
    shrunk = dataclasses.replace(trial, case=small)
    if (said := of_another_meaning(trial.backend, _symptoms(shrunk, {}))) is not None:
        return said
    return explained_by(shrunk, [trial.case], announce)


def explained_by(
    trial: Trial, also: Sequence[Case] = (), announce: Callable[[Case], None] = lambda case: None
) -> str | None:
    """One sentence on the fact that explains a failing case, or None.

    Args:
        trial: of the failing case.
        also: other cases that fail, such as the one that it was shrunk from.
        announce: is told of every case before it runs for the first time, and now and then that work goes on.
    """
    if any(not isinstance(symptom, BY_VALUE) for symptom in _symptoms(trial, {}) or (None,)):
        return None
    if (evidence := _evidence(trial, also, announce)) is None:
        return None
    plain, started = _fitting(Fact("", {}), evidence), time.monotonic()
    found = []
    for fact in all_facts():
        if loosens(fact, trial):
            announce(trial.case)
            found.append(_fitting(fact, evidence))
        if time.monotonic() - started > _SECONDS:
            return None
    plausible = sorted((fit for fit in found if fit.z <= _PLAUSIBLE), key=lambda fit: -fit.likelihood)
    if any(fit.fact.fields.get("products") == "tf32" for fit in plausible):
        # Of everyday numbers TF32 that is rounded to nearest has the bits of fp16, which hardly anybody computes in.
        plausible = [fit for fit in plausible if fit.fact.fields.get("products") != "fp16"]
    for fit in plausible:
        announce(trial.case)
        if not any(_symptoms(each, fit.fact.fields) for each in evidence):
            return _sentence(fit, plain.z, trial)
    return None


def _sentence(fit: _Fit, before: float, trial: Trial) -> str:
    fields = {**getattr(trial.backend.kernel, "facts", {}), **fit.fact.fields}
    shown = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in fields.items()}
    said = f" (largest z {fit.z:.2g} instead of {before:.3g})" if before > LIMIT else ""
    return f'looks like {fit.fact.words}{said}: declare capabilities["{KEY}"] = {shown!r}, or mend it'


def _symptoms(trial: Trial, fields: Mapping[str, Any]) -> tuple[Symptom, ...]:
    """What is wrong with a case, once some fields are declared."""
    try:
        return examine(trial.case, declaring(trial.backend, fields), trial.device, trial.poisons).symptoms
    except UnsupportedCase:
        return ()


def _evidence(trial: Trial, also: Sequence[Case], announce: Callable[[Case], None]) -> list[Trial] | None:
    """The failing case, the others and larger ones, those that the backend takes; None where one of them raises."""
    found = [trial]
    for case in dict.fromkeys((*also, *_larger(trial.case, trial.backend))):
        if case != trial.case and trial.backend.refusal(case, trial.device.type) is None:
            found.append(dataclasses.replace(trial, case=case))
    taken = []
    for each in found:
        announce(each.case)
        try:
            assert each.observations
            assert each.second.observations
        except UnsupportedCase:
            continue
        except Exception:
            # What raises is nothing that arithmetic explains.
            return None
        taken.append(each)
    return taken


def _larger(case: Case, backend: Backend) -> Iterator[Case]:
    """Cases that tell more about a kernel than one of a few tokens: longer documents, and subnormal numbers."""
    changes: dict[str, Any] = {"lengths": (5, 70), "document_ids": None, "capacity": 0, "padding": 0, "cuts": ()}
    changes |= {"ranks": 1, "tensor_ranks": 1}
    with contextlib.suppress(CaseError):
        if "kernel" in backend.levels:
            # What a layer adds is not what is asked for.
            names = (
                "heads",
                "kv_heads",
                "head_dim",
                "head_dim_v",
                "causal",
                "window",
                "scale",
                "softcap",
                "dtype",
                "seed",
            )
            options = {name: getattr(case, name) for name in (*names, "seed")}
            plain = Case(level="kernel", lengths=(5, 70), **options)
        else:
            plain = case.replace(**changes)
        yield plain.replace(values="gaussian")
        if case.dtype == "fp32":
            yield plain.replace(values="tiny")


def _results(trial: Trial, answer: Mapping[str, Expected]) -> Iterator[tuple[str, torch.Tensor, Expected]]:
    for name, got in trial.observations[0].results.items():
        expected = answer.get(name)
        if expected is not None and got.shape == expected.value.shape and got.numel():
            yield name, got, expected


def _fitting(fact: Fact, evidence: Sequence[Trial]) -> _Fit:
    """How well a fact fits all evidence, of both value seeds.

    What a layer's budget is, a few samples know vaguely: facts are compared by kernel cases where there are any.
    """
    worst, likelihood = 0.0, 0.0
    by_kernel = any(each.case.level == "kernel" for each in evidence)
    for trial in (seed for each in evidence for seed in (each, each.second)):
        profile = dataclasses.replace(trial.profile, **fact.fields)
        answer = trial.answer_under(profile, SAMPLES)
        vague = _VAGUE if trial.case.level == "layer" else 1.0
        for name, got, expected in _results(trial, answer):
            z = deviations(trial.case, got, expected)
            worst = max(worst, z.max().item() * LIMIT / limit(trial.case) * vague)
            if fact.fields and worst <= _PLAUSIBLE and trial.case.level == "kernel" and trial.case.values != "tiny":
                judged = _Judged(trial, name, got, expected)
                if judged.one_sided(profile) or judged.far_less(trial.answer[name]):
                    worst = torch.inf
            if trial.case.level == "kernel" or not by_kernel:
                settled = (expected.variance > 0) & z.isfinite() & expected.value.isfinite()
                likelihood -= (z[settled].square() + expected.variance[settled].log()).sum().item() / 2
            if fact.fields and worst > _PLAUSIBLE:
                # Nothing that is left to look at would bring it back.
                return _Fit(fact, worst, -torch.inf)
    return _Fit(fact, worst, likelihood)


@functools.lru_cache(maxsize=16)
def _of_a_larger_scale(case: Case) -> dict[str, torch.Tensor]:
    """The results of a kernel case whose softmax scale is larger by one ``_STEP``: the same for every fact."""
    moved = case.replace(scale=case.softmax_scale * (1 + _STEP))
    answer = kernel_answer(moved, kernel_inputs(case, "cpu"), Profile(), degrees=False)
    return {name: expected.value for name, expected in answer.items()}


@dataclasses.dataclass(frozen=True)
class _Judged:
    """One result of a kernel case, of numbers that are not subnormal: those vanish together."""

    trial: Trial
    name: str
    got: torch.Tensor
    expected: Expected

    def one_sided(self, profile: Profile) -> bool:
        """Whether it is off in one direction by more than a fact's roundings are, which have none.

        A scale that is wrong by a hundredth is within a rounding to bf16 of each element. The factor that fits a result
        best, by least squares, or the change of the scale that does, is then more standard errors away than chance
        allows. What cuts off operands shrinks results, and scores, by so much.
        """
        narrow = Narrow.of(self.trial.case.dtype, profile)
        value, variance = self.expected.value, self.expected.variance
        moved = _of_a_larger_scale(self.trial.case)[self.name]
        directions = [(value, narrow.scores_alike if narrow else 0.0)]
        directions.append(((moved - value) / _STEP, 2 * narrow.cut if narrow else 0.0))
        return any(self._leans(direction, variance, allowed) for direction, allowed in directions)

    def _leans(self, direction: torch.Tensor, variance: torch.Tensor, allowed: float) -> bool:
        some = (variance > 0) & direction.isfinite()
        along = direction[some]
        weight = along.square().div(variance[some]).sum().item()
        off = (self.got.double() - self.expected.value)[some].mul(along).div(variance[some]).sum().item()
        return abs(off) > weight * allowed + _SYSTEMATIC * weight**0.5

    def far_less(self, plain: Expected) -> bool:
        """Whether the fact allows for far more than there is, where it allows for far more than was allowed before.

        Of a few numbers, or rows that see hardly more than one key, nobody knows.
        """
        more = self.expected.variance > _FAR_MORE * plain.variance
        if self.trial.case.values != "gaussian" or more.sum() < _TELLING:
            return False
        z = deviations(self.trial.case, self.got, self.expected)[more]
        return bool(z.square().mean() < _FAR_LESS)
