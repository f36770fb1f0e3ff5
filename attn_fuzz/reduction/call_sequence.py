"""A call that fails after other calls only: which of them it takes, as few and as small as they go, kept for replay."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judge import judge
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.layer_judge import judge_layer_calls
from attn_fuzz.batch.layer_questions import LAYER_QUESTIONS
from attn_fuzz.batch.questions import QUESTIONS
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.order import simplicity
from attn_fuzz.cases.simpler import narrower, simpler_options
from attn_fuzz.cases.smaller import clipped
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.execution.process import lacks_memory
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.oracle.symptoms import Symptom
from attn_fuzz.reduction.packed import CLIPS
from attn_fuzz.reduction.reduce import Deadline, Pass, reduce
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.monte_carlo import CONFIRMING_SAMPLES


@dataclasses.dataclass(frozen=True)
class CallSequence:
    """Calls in a row, one of which fails."""

    batch: CallBatch
    index: int
    """Which of them."""
    question: Question
    """What was asked."""
    asked: int
    """Of how many calls, from the first on, more was asked than the budgets."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "case": self.batch.case.to_dict(),
            "ends": list(self.batch.ends),
            "index": self.index,
            "poison": self.question.poison,
            "asks": self.question.asked,
            "asked": self.asked,
        }

    @classmethod
    def from_dict(cls, data: Any) -> CallSequence:
        """The inverse of ``to_dict``.

        Raises:
            CaseError: for anything else.
        """
        try:
            batch = CallBatch(Case.from_dict(data["case"]), tuple(int(end) for end in data["ends"]))
            found = cls(batch, int(data["index"]), Question(str(data["poison"]), str(data["asks"])), int(data["asked"]))
        except (LookupError, TypeError, ValueError) as error:
            raise CaseError(f"these are no calls in a row: {type(error).__name__} {error}") from None
        count = len(batch.ends)
        questions = LAYER_QUESTIONS if batch.case.level == "layer" else QUESTIONS
        known = found.question.poison in POISONS and found.question.asked in questions
        if not known or not 0 <= found.index < count or not 0 < found.asked <= count:
            raise CaseError("these are no calls in a row: no such call, poison or question")
        return found

    def judged(self, backend: Backend, device: torch.device) -> Judged:
        """What the backend makes of all of them; of layers by careful budgets."""
        if self.batch.case.level == "layer":
            careful = CONFIRMING_SAMPLES
            return judge_layer_calls(self.batch, backend, device, self.question, samples=careful, asked=self.asked)
        return judge(self.batch, backend, device, self.question, asked=self.asked)

    def words(self, judged: Judged) -> str | None:
        """What is wrong with the call, or None."""
        z, name = judged.worst()[self.index]
        if z <= LIMIT:
            return None
        after = f" after {self.index} of them" if self.index else ""
        asks = f", asked for {self.question.asked!r} too" if self.question.asked and self.index < self.asked else ""
        what = name if self.index in judged.broken else f"{name}: z = {z:.3g}"
        return f"one of {len(self.batch.ends)} calls in a row{after}{asks}: {what}"

    def symptom(self, judged: Judged) -> type[Symptom]:
        """What the call is accused of."""
        if self.index in judged.broken:
            return judged.fallen(self.index)
        return judged.symptom(judged.worst()[self.index][1])

    def of(self, documents: Sequence[Sequence[int]], index: int) -> CallSequence | None:
        """Some documents of some calls, the failing one among them; all of them are asked."""
        case = subset(self.batch.case, [document for call in documents for document in call])
        ends = tuple(itertools.accumulate(len(call) for call in documents))
        batch = CallBatch.of(case, ends)
        return None if batch is None else CallSequence(batch, index, self.question, len(ends))


def _fewer_calls(sequence: CallSequence) -> Iterator[CallSequence | None]:
    """The call alone, with a neighbour, then without every half, quarter and so on of the others."""
    calls, index = [list(range(*span)) for span in sequence.batch.spans], sequence.index
    count = len(calls)
    if count == 1:
        return
    yield sequence.of([calls[index]], 0)
    for begin in (index - 1, index):
        if 0 <= begin < begin + 2 <= count and count > 2:
            yield sequence.of(calls[begin : begin + 2], index - begin)
    size = count // 2
    while size:
        for begin in range(0, count, size):
            end = min(begin + size, count)
            if not begin <= index < end:
                yield sequence.of(calls[:begin] + calls[end:], index - (end - begin) * (end <= index))
        size //= 2


def _fewer_documents(sequence: CallSequence) -> Iterator[CallSequence | None]:
    calls = [list(range(*span)) for span in sequence.batch.spans]
    for place, call in enumerate(calls):
        for document in call if len(call) > 1 else ():
            rest = [each for each in call if each != document]
            yield sequence.of([*calls[:place], rest, *calls[place + 1 :]], sequence.index)


def _shorter(sequence: CallSequence) -> Iterator[CallSequence | None]:
    case = sequence.batch.case
    for most in CLIPS:
        small = clipped(case, most, most)
        batch = CallBatch.of(small, sequence.batch.ends)
        yield None if batch is None else dataclasses.replace(sequence, batch=batch)


def _simpler(sequence: CallSequence) -> Iterator[CallSequence | None]:
    case = sequence.batch.case
    for small in (*narrower(case), *simpler_options(case)):
        same = small is not None and len(small.packed_lengths) == len(case.packed_lengths)
        batch = CallBatch.of(small, sequence.batch.ends) if same else None
        yield None if batch is None else dataclasses.replace(sequence, batch=batch)


def _simplicity(sequence: CallSequence) -> tuple[Any, ...]:
    """Fewer calls are simpler, and of as many those that make a simpler case."""
    return len(sequence.batch.ends), simplicity(sequence.batch.case)


_PASSES: Final[tuple[Pass[CallSequence], ...]] = (
    _fewer_calls,
    # Before single documents, because every later attempt costs less.
    _shorter,
    _fewer_documents,
    _simpler,
)


def _taken(call: Case, backend: Backend, device: torch.device) -> bool:
    return any(call.packed_lengths) and backend.refusal(call, device.type) is None


def smallest(sequence: CallSequence, backend: Backend, device: torch.device, seconds: float) -> CallSequence:
    """As few and as small calls as still make the one fail, found within so many seconds.

    Args:
        sequence: calls of which one fails.
        backend: what runs them.
        device: where.
        seconds: after which the smallest so far will do.
    """

    def fails(small: CallSequence) -> bool:
        # A call of documents without keys, or without queries, is no case.
        calls = (small.batch.attempted(index) for index in range(len(small.batch.ends)))
        if any(call is None or not _taken(call, backend, device) for call in calls):
            return False
        try:
            # Twice in a row: the first time what was tried before comes before it, too.
            return all(small.words(small.judged(backend, device)) is not None for _ in range(2))
        except Exception as error:
            if not lacks_memory(error):
                raise
            return False

    return reduce(sequence, _PASSES, fails, _simplicity, Deadline.after(seconds))


def verdict_among(alone: Verdict, sequence: CallSequence | None, backend: Backend, device: torch.device) -> Verdict:
    """The verdict on a case where it passes by itself, but is kept with calls among which it fails.

    Args:
        alone: what was said of it by itself.
        sequence: those calls, if any.
        backend: what runs them.
        device: where.
    """
    if sequence is None or alone.symptoms:
        return alone
    judged = sequence.judged(backend, device)
    if (words := sequence.words(judged)) is None:
        return alone
    return dataclasses.replace(alone, symptoms=(sequence.symptom(judged)("batch", "call", words),))


def call_sequence_of(data: Mapping[str, Any]) -> CallSequence | None:
    """Of a stored finding: the calls that it takes, or None where it takes no others.

    Raises:
        CaseError: when they cannot be read.
    """
    return None if data.get("sequence") is None else CallSequence.from_dict(data["sequence"])
