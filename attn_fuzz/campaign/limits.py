"""What a user's kernel takes, found out before it is fuzzed: each limit is named once instead of ending the campaign.

Small cases run in processes of their own, where a crash costs an answer: dtypes, head dimensions, grouped heads,
windows and memory layouts that the kernel's declaration allows. What raises, dies or never comes back there is a limit;
the campaign goes on without it. What comes back wrong is none: that is for the campaign to find.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.known import KnownIssue, built_on, issues_below
from attn_fuzz.backends.registry import Backend, calls_of
from attn_fuzz.campaign.compile_probe import AlsoFor, Noticed, also_for, together
from attn_fuzz.campaign.crowds import takes_crowds
from attn_fuzz.campaign.isolated import Ended, Isolated, Report, Subject
from attn_fuzz.campaign.limit_questions import GROUPED_VALUES, OTHER_VALUES, Question, plain_case, questions_of
from attn_fuzz.campaign.preflight import why_unusable
from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.finding import Finding
from attn_fuzz.generation.domain import Domain
from attn_fuzz.reference.case import Case

ANSWER_SECONDS: Final = {"cpu": 45.0, "cuda": 150.0}
"""After which a call counts as hung, beside its process's start: compilers for GPUs take minutes for one."""

SOON_SECONDS: Final = 40.0
"""The same of a call in which nothing is compiled or imported."""

ASKING_SECONDS: Final = 45.0
"""Beyond the plain cases; what has not been asked by then is taken to be as declared."""

CHILDREN: Final = 6
"""Processes that ask side by side, at most."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """Something that a user's kernel does not take."""

    axis: str
    """Such as ``memory misaligned``."""
    how: str
    """``refused`` by a typed error or an ordinary one, ``crashed``, ``hung``, or ``wrong`` for a known fault below,
    and where nothing was promised."""
    message: str
    case: Case
    below: str | None = None
    """The known fault below the kernel that explains it, with where it is reported."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "case": self.case.to_dict()}


def finding_of(limit: Limit, backend: str, device: str) -> Finding:
    """The finding that a limit is where nothing may be one."""
    symptom = {"crashed": "Crashed", "hung": "Hung"}.get(limit.how, "Refused")
    note = () if limit.below is None else (f"Known below it: {limit.below}",)
    return Finding(
        backend=backend,
        device=device,
        symptom=symptom,
        checks=("limits",),
        messages=(f"{symptom} [limits] {limit.axis}: {limit.message}", *note),
        symptoms=({"symptom": symptom, "check": "limits", "tensor": "call"},),
        case=limit.case,
        original_case=limit.case,
        cases_to_find=0,
        seconds_to_find=0.0,
        environment=environment(device),
    )


@dataclasses.dataclass(frozen=True)
class LimitsFound:
    """What was found out."""

    limits: tuple[Limit, ...] = ()
    without: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Capabilities that the campaign goes on with, where they are not those declared."""
    fatal: Limit | None = None
    """What no process survives, or comes back from, whatever dtype it is called with: the finding, and no campaign."""


_Asked = TypeVar("_Asked")
_Found = TypeVar("_Found")


class _Children:
    """Answers from processes of their own, a few side by side."""

    def __init__(self, subject: Subject, children: int) -> None:
        self._subject, self._children = subject, children
        self._made: list[Isolated] = []
        self._idle: list[Isolated] = []
        self._over = False
        self.noticed = Noticed()

    @contextlib.contextmanager
    def _child(self) -> Iterator[Isolated]:
        """One that nobody else asks meanwhile."""
        if self._over:
            raise Ended
        try:
            child = self._idle.pop()
        except IndexError:
            child = Isolated(self._subject, ANSWER_SECONDS[self._subject.device.partition(":")[0]], SOON_SECONDS)
            self._made.append(child)
            if self._over:
                child.end()
                raise Ended from None
        yield child
        self._idle.append(child)

    def plain(self, cases: Sequence[Case]) -> list[Report]:
        """What came of plain cases, with the operators that ran; all at once, since each may have to be waited for."""

        def ask(case: Case) -> Report:
            with self._child() as child:
                return self.noticed.note(case, child.report(case, operators=True), child.report)

        return self._side_by_side(ask, cases, len(cases))

    def answers(self, base: Case, questions: Sequence[Question], deadline: float) -> list[Report | None]:
        """What came of each question; None for those of an axis that has failed, and for which there was no time.

        Before a memory layout the plain one runs: a kernel may keep what was compiled for addresses such as those.
        """
        failed: set[str] = set()

        def ask(question: Question) -> Report | None:
            if (question.axis in failed and not question.unpromised) or time.monotonic() > deadline:
                return None
            with self._child() as child:
                if question.axis.startswith("memory"):
                    child.report(base.replace(dtype=question.case.dtype))
                if question.unpromised:
                    return child.report(question.case, judged=True)
                report = self.noticed.note(question.case, child.report(question.case), child.report)
            if _how(report) is not None:
                failed.add(question.axis)
            return report

        return self._side_by_side(ask, questions, self._children)

    def seconds(self, case: Case) -> float:
        """What a case takes once all is compiled and loaded; infinity where it does not come back as it should."""
        with self._child() as child:
            for _ in range(2):
                started = time.monotonic()
                if _how(child.report(case)) is not None:
                    return math.inf
        return time.monotonic() - started

    def compiled_for(self, base: Case, backend: Backend, domain: Domain) -> dict[str, Any]:
        """What a kernel compiles for, as capabilities; nothing where it does not."""

        def ask(also: AlsoFor) -> Mapping[str, Any]:
            with self._child() as child:
                # It is compiled, perhaps by another process; libraries are loaded in the first case of all.
                child.report(base)
                return also.asked(child.report)

        if not self.noticed.compiles(domain.capabilities):
            return {}
        found = self._side_by_side(ask, also_for(base, backend, domain), self._children)
        return self.noticed.found(domain.capabilities, found)

    def _side_by_side(self, work: Callable[[_Asked], _Found], items: Sequence[_Asked], at_once: int) -> list[_Found]:
        with ThreadPoolExecutor(at_once) as pool:
            try:
                return list(pool.map(work, items))
            except BaseException:
                # Ctrl-C comes to this thread: what the others wait for ends with their children, and nothing is begun.
                self._over = True
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise

    def close(self) -> None:
        """Ends all of them."""
        for child in self._made:
            child.end()
        self._made.clear()
        self._idle.clear()


def _how(report: Report) -> str | None:
    """How a case was not taken, or None where it was, right or wrong."""
    if report.refusal is not None:
        return "refused"
    if report.symptom == "Hung":
        return "hung"
    if report.symptom == "Crashed":
        return "crashed"
    return None


def _limit(question: Question, report: Report | None, device: str, operators: Sequence[str]) -> Limit | None:
    if report is None:
        return None
    how = _how(report)
    below = next(
        (issue for issue in issues_below(device, question.case, calls_of(question.case)) if built_on(issue, operators)),
        None,
    )
    if how is None and (report.symptom is None or (below is None and not question.unpromised)):
        return None
    message = report.refusal or report.message
    return Limit(question.axis, how or "wrong", message, question.case, _cited(below))


def _cited(below: KnownIssue | None) -> str | None:
    return None if below is None else f"{below.id}: {below.about} ({below.reference})"


def _fatal(plain: Sequence[Case], reports: Sequence[Report], asking: _Children) -> Limit | None:
    """What ends its process or never comes back in every plain case, on the smallest case that does."""
    if any(report.survived for report in reports):
        return None
    case, report = plain[0], reports[0]
    if _how(report) == "crashed":
        # Of one token, where that dies as well: each process takes seconds, and a hang takes more.
        small = case.replace(lengths=(1,), cuts=(), heads=1, kv_heads=1)
        (again,) = asking.plain([small])
        if _how(again) == "crashed" and not again.survived:
            case, report = small, again
    return Limit("every call", _how(report) or "crashed", report.message, case)


def infer_limits(
    name: str, device: str, dtypes: Sequence[str], children: int, tell: Callable[[Limit], None]
) -> LimitsFound:
    """Asks a user's kernel or layer what it takes of what it declares.

    Args:
        name: of the backend.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtypes: that the campaign is about; none for all that are declared.
        children: processes side by side.
        tell: called with each limit as it is found.

    Raises:
        BackendUnavailable: where nothing of it can be tested, with the reason in one sentence.
    """
    backend, kind = registry.load(name), device.partition(":")[0]
    domain = Domain.of(backend.kernel.capabilities_on(kind), kind, dtypes)
    asking = _Children(Subject(name, device, judged=False), min(children, CHILDREN))
    try:
        plain = [plain_case(backend, domain, dtype) for dtype in domain.dtypes]
        reports: list[Report | None] = [*(answers := asking.plain(plain))]
        if (sentence := why_unusable(name, answers)) is not None:
            raise BackendUnavailable(sentence)
        working = [case for case, report in zip(plain, answers, strict=True) if _how(report) is None]
        if not working:
            # It fails wherever it is called: that is a finding, the campaign's where processes survive it.
            return LimitsFound(fatal=_fatal(plain, answers, asking))
        operators = sorted({operator for report in answers for operator in report.operators})
        questions = [Question(f"dtype {case.dtype}", case) for case in plain]
        base = next((case for case in working if case.dtype == "bf16"), working[-1])
        more = questions_of(base, backend, domain, [case.dtype for case in working])
        reports += asking.answers(base, more, time.monotonic() + ASKING_SECONDS)
        crowds = takes_crowds(base, domain, asking.seconds)
        compiles = asking.compiled_for(base, backend, domain)
    finally:
        asking.close()
    limits: list[Limit] = []
    right: set[int] = {base.head_dim}
    pairs: list[tuple[int, int]] = []
    for question, report in zip([*questions, *more], reports, strict=True):
        limit = _limit(question, report, kind, operators)
        if limit is None and report is not None and question.axis.startswith("head_dim"):
            right.add(question.case.head_dim)
        if question.axis == GROUPED_VALUES:
            limit = _of_both(limit, limits, pairs)
        elif limit is None and report is not None and question.case.head_dim_v is not None:
            pairs.append((question.case.head_dim, question.case.head_dim_v))
        if limit is not None and limit.axis not in {each.axis for each in limits}:
            limits.append(limit)
            tell(limit)
    without = {**without_of(limits, right, domain), **values_of(limits, pairs, domain)}
    without |= {"crowds": True} if crowds else {}
    return LimitsFound(tuple(limits), together(compiles, without))


def _of_both(limit: Limit | None, before: Sequence[Limit], pairs: Sequence[tuple[int, int]]) -> Limit | None:
    """A limit of such values beside grouped heads, where each of both is taken alone: else it has been named."""
    if limit is None or "grouped heads" in {each.axis for each in before}:
        return None
    return limit if (limit.case.head_dim, limit.case.head_dim_v) in pairs else None


def without_of(limits: Sequence[Limit], right: set[int], domain: Domain) -> dict[str, Any]:
    """Capabilities without the limits.

    Args:
        limits: what was found.
        right: head dimensions that were taken.
        domain: of the declared capabilities.
    """
    stated, axes = domain.capabilities, {limit.axis for limit in limits}
    without: dict[str, Any] = {}
    if dtypes := {axis.split()[1] for axis in axes if axis.startswith("dtype ")}:
        without["dtypes"] = tuple(dtype for dtype in stated.dtypes if dtype not in dtypes)
    if memories := {axis.split()[1] for axis in axes if axis.startswith("memory ")}:
        for name in ("memories", "far_memories"):
            before = getattr(stated, name)
            if memories.intersection(before):
                without[name] = tuple(memory for memory in before if memory not in memories)
    if dims := {int(axis.split()[1]) for axis in axes if axis.startswith("head_dim ")}:
        without["head_dims"] = tuple(dim for dim in domain.every_head_dim if taken(dim, right, dims))
    if "grouped heads" in axes:
        without["gqa"] = False
    if GROUPED_VALUES in axes:
        without["gqa_head_dims_v"] = False
    if "loose max_seqlen" in axes:
        without["loose_max_seqlen"] = False
    if sides := {axis.split()[1] for axis in axes if axis.startswith("gaps ")}:
        without["gaps"] = tuple(side for side in stated.gaps if side not in sides)
    if "window, causal" in axes:
        without["window"] = False
    elif "window, non-causal" in axes:
        without["window_needs_causal"] = True
    return without


def values_of(limits: Sequence[Limit], pairs: Sequence[tuple[int, int]], domain: Domain) -> dict[str, Any]:
    """Which numbers of channels values may have beside those of keys, as a capability.

    Args:
        limits: what was found.
        pairs: (head_dim, head_dim_v) that were taken.
        domain: of the declared capabilities.
    """
    if OTHER_VALUES in {limit.axis for limit in limits}:
        return {"head_dims_v": tuple(pairs) or False}
    return {"head_dims_v": True} if pairs and domain.capabilities.head_dims_v is None else {}


def _kind_of(dim: int) -> str:
    """Head dimensions of a kind are taken or not together: powers of two, multiples of 8, all others."""
    return "rest" if dim % 8 else "power of two" if dim & (dim - 1) == 0 else "multiple of 8"


def taken(dim: int, right: set[int], wrong: set[int]) -> bool:
    """Whether a head dimension is taken: as was seen, or as the nearest one of its kind that was asked."""
    alike = [other for other in sorted(right | wrong) if _kind_of(other) == _kind_of(dim)]
    if not alike:
        return True
    return min(alike, key=lambda other: (abs(other - dim), -other)) in right
