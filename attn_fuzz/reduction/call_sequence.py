"""A call that fails in company only: which other calls it takes, as few and as small as they go, kept for replay."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.calls_batch import Judged, Turn, judge
from attn_fuzz.batch.questions import QUESTIONS
from attn_fuzz.cases.simpler import narrower, simpler_options
from attn_fuzz.cases.smaller import clipped
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.generation.calls import Volley
from attn_fuzz.oracle.checks.budget import LIMIT
from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.oracle.symptoms import Crashed, Symptom
from attn_fuzz.reduction.packed import CLIPS
from attn_fuzz.reference.case import Case, CaseError


@dataclasses.dataclass(frozen=True)
class Company:
    """Calls in a row, one of which fails."""

    volley: Volley
    index: int
    """Which of them."""
    turn: Turn
    """What was asked."""
    asked: int
    """Of how many calls, from the first on, more was asked than the budgets."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "case": self.volley.case.to_dict(),
            "ends": list(self.volley.ends),
            "index": self.index,
            "poison": self.turn.poison,
            "asks": self.turn.asked,
            "asked": self.asked,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Company:
        """The inverse of ``to_dict``.

        Raises:
            CaseError: for anything else.
        """
        try:
            volley = Volley(Case.from_dict(data["case"]), tuple(int(end) for end in data["ends"]))
            found = cls(volley, int(data["index"]), Turn(str(data["poison"]), str(data["asks"])), int(data["asked"]))
        except (LookupError, TypeError, ValueError) as error:
            raise CaseError(f"these are no calls in a row: {type(error).__name__} {error}") from None
        count = len(volley.ends)
        known = found.turn.poison in POISONS and found.turn.asked in QUESTIONS
        if not known or not 0 <= found.index < count or not 0 < found.asked <= count:
            raise CaseError("these are no calls in a row: no such call, poison or question")
        return found

    def judged(self, backend: Backend, device: torch.device) -> Judged:
        """What the backend makes of all of them."""
        return judge(self.volley, backend, device, self.turn, asked=self.asked)

    def words(self, judged: Judged) -> str | None:
        """What is wrong with the call, or None."""
        z, name = judged.worst()[self.index]
        if z <= LIMIT:
            return None
        after = f" after {self.index} of them" if self.index else ""
        asks = f", asked for {self.turn.asked!r} too" if self.turn.asked and self.index < self.asked else ""
        what = name if self.index in judged.broken else f"{name}: z = {z:.3g}"
        return f"one of {len(self.volley.ends)} calls in a row{after}{asks}: {what}"

    def symptom(self, judged: Judged) -> type[Symptom]:
        """What the call is accused of."""
        return Crashed if self.index in judged.broken else judged.symptom(judged.worst()[self.index][1])

    def of(self, documents: Sequence[Sequence[int]], index: int) -> Company | None:
        """Some documents of some calls, the failing one among them; all of them are asked."""
        case = subset(self.volley.case, [document for call in documents for document in call])
        if case is None:
            return None
        ends = tuple(itertools.accumulate(len(call) for call in documents))
        return Company(Volley(case, ends), index, self.turn, len(ends))


def _fewer_calls(company: Company) -> Iterator[Company | None]:
    """The call alone, with a neighbour, then without every half, quarter and so on of the others."""
    calls, index = [list(range(*span)) for span in company.volley.spans], company.index
    count = len(calls)
    if count == 1:
        return
    yield company.of([calls[index]], 0)
    for begin in (index - 1, index):
        if 0 <= begin < begin + 2 <= count and count > 2:
            yield company.of(calls[begin : begin + 2], index - begin)
    size = count // 2
    while size:
        for begin in range(0, count, size):
            end = min(begin + size, count)
            if not begin <= index < end:
                yield company.of(calls[:begin] + calls[end:], index - (end - begin) * (end <= index))
        size //= 2


def _fewer_documents(company: Company) -> Iterator[Company | None]:
    calls = [list(range(*span)) for span in company.volley.spans]
    for place, call in enumerate(calls):
        for document in call if len(call) > 1 else ():
            rest = [each for each in call if each != document]
            yield company.of([*calls[:place], rest, *calls[place + 1 :]], company.index)


def _shorter(company: Company) -> Iterator[Company | None]:
    case = company.volley.case
    longest = max(*case.packed_lengths, *case.packed_key_lengths)
    for most in CLIPS:
        if most < longest:
            small = clipped(case, most, most)
            volley = None if small is None else Volley(small, company.volley.ends)
            yield None if volley is None else dataclasses.replace(company, volley=volley)


def _simpler(company: Company) -> Iterator[Company | None]:
    case = company.volley.case
    for small in (*narrower(case), *simpler_options(case)):
        same = small is not None and len(small.packed_lengths) == len(case.packed_lengths)
        volley = Volley(small, company.volley.ends) if small is not None and same else None
        yield None if volley is None else dataclasses.replace(company, volley=volley)


_STEPS: Final[tuple[Callable[[Company], Iterator[Company | None]], ...]] = (
    _fewer_calls,
    # Before single documents, because every later attempt costs less.
    _shorter,
    _fewer_documents,
    _simpler,
)


def _taken(call: Case, backend: Backend, device: torch.device) -> bool:
    return any(call.packed_lengths) and backend.refusal(call, device.type) is None


def smallest(company: Company, backend: Backend, device: torch.device, seconds: float) -> Company:
    """As few and as small calls as still make the one fail, found within so many seconds.

    Args:
        company: calls of which one fails.
        backend: what runs them.
        device: where.
        seconds: after which the smallest so far will do.
    """
    deadline = time.monotonic() + seconds

    def fails(small: Company) -> bool:
        calls = (subset(small.volley.case, range(*span)) for span in small.volley.spans)
        # A call of documents without keys, or without queries, is no case.
        if any(call is None or not _taken(call, backend, device) for call in calls):
            return False
        try:
            # Twice in a row: the first time what was tried before is company, too.
            return all(small.words(small.judged(backend, device)) is not None for _ in range(2))
        except (torch.OutOfMemoryError, MemoryError):
            return False

    progress = True
    while progress:
        progress = False
        for small in (each for step in _STEPS for each in step(company)):
            if time.monotonic() > deadline:
                return company
            if small is not None and fails(small):
                company, progress = small, True
                break
    return company


def in_company(alone: Verdict, company: Company | None, backend: Backend, device: torch.device) -> Verdict:
    """The verdict on a case where it passes by itself, but is kept with calls among which it fails.

    Args:
        alone: what was said of it by itself.
        company: those calls, if any.
        backend: what runs them.
        device: where.
    """
    if company is None or alone.symptoms:
        return alone
    judged = company.judged(backend, device)
    if (words := company.words(judged)) is None:
        return alone
    return dataclasses.replace(alone, symptoms=(company.symptom(judged)("volley", "call", words),))


def company_of(data: Mapping[str, Any]) -> Company | None:
    """Of a stored finding: the calls that it takes, or None where it takes no others.

    Raises:
        CaseError: when they cannot be read.
    """
    return None if data.get("company") is None else Company.from_dict(data["company"])
