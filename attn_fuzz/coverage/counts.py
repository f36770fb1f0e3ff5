"""How often values of axes were reached, and pairs of values: counted by a worker, added up by its parent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch

from attn_fuzz.backends.registry import calls_of
from attn_fuzz.coverage.axes import DOCUMENTS, LENGTHS, OCTAVES, PLACES, QUESTIONS, VALUES, Value, class_of, options_of
from attn_fuzz.reference.case import Case

Pair = tuple[Value, Value]
"""Two values, in the order of ``axes.VALUES``; the same one twice stands for that value by itself."""

_QUERIES: Final = PLACES["queries", "0"]
_KEYS: Final = PLACES["keys", "0"]
_DOCUMENTS: Final = PLACES["documents", "1"]
_CLASSES: Final = len(LENGTHS)

_MOST_ROWS: Final = 4096
"""Cases that are multiplied out at once: two megabytes."""

_LONGEST_REASON: Final = 100
"""Letters."""

_SHORT: Final = tuple(class_of(length, LENGTHS) for length in range(LENGTHS[-1]))
"""Classes of lengths below the last class, looked up."""


@dataclasses.dataclass
class Reached:
    """What some cases reached. The calls of a batch are a case each."""

    pairs: Counter[Pair] = dataclasses.field(default_factory=Counter)
    """Cases by pair. Of queries and keys only such pairs count as one document has."""
    lengths: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    """Documents by where the octaves (``axes.OCTAVES``) of their queries and keys begin; of a layer once for each
    micro-sequence that it is active in."""
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    """Draws that were not taken, by why."""

    def add(self, other: Reached) -> None:
        """Takes in what others reached."""
        self.pairs.update(other.pairs)
        self.lengths.update(other.lengths)
        self.refused.update(other.refused)

    def __bool__(self) -> bool:
        return bool(self.pairs or self.refused)


def lengths_of(case: Case) -> list[tuple[int, int]]:
    """(queries, keys) of every document of every varlen call that a case makes, but for those that have neither."""
    pairs = [pair for call in calls_of(case) for pair in call]
    # Of a layer's documents those that are not active in a micro-sequence are not there; of a kernel's all are.
    return pairs if case.level == "kernel" else [pair for pair in pairs if pair != (0, 0)]


def _length_class(length: int) -> int:
    return _SHORT[length] if length < len(_SHORT) else _CLASSES - 1


class Counts:
    """What a worker counts: of each case which values it has, multiplied out for all of them at once."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._pairs = torch.zeros(len(VALUES), len(VALUES), dtype=torch.float64)
        self._lengths: Counter[tuple[int, int]] = Counter()
        self._refused: Counter[str] = Counter()
        self._rows: list[set[int]] = []
        self._of_documents: Counter[tuple[int, int]] = Counter()

    def refuse(self, reason: str) -> None:
        """Counts a draw that was not taken."""
        # What follows a colon is of this one call: how much memory it asked for, say.
        self._refused[reason.partition(":")[0][:_LONGEST_REASON]] += 1

    def count(self, calls: Sequence[Case], mode: str, questions: Sequence[str] = ()) -> None:
        """Counts cases that have all but their documents in common.

        Args:
            calls: a case, or calls of a batch, each as a case of its own.
            mode: they ran in.
            questions: what each was asked beside its budgets.
        """
        if not calls:
            return
        shared = {PLACES[each] for each in (*options_of(calls[0]).items(), ("mode", mode))}
        # What is asked of few is none of the axis' values.
        shared |= {PLACES["question", question] for question in questions if question in QUESTIONS}
        for call in calls:
            pairs = lengths_of(call)
            # The number of binary digits of a length is the place of its octave.
            self._lengths.update((q.bit_length(), k.bit_length()) for q, k in pairs)
            documents = {(_length_class(q), _length_class(k)) for q, k in pairs}
            self._of_documents.update(documents)
            row = {*shared, _DOCUMENTS + class_of(len(call.packed_lengths), DOCUMENTS)}
            row.update(place for q, k in documents for place in (_QUERIES + q, _KEYS + k))
            self._rows.append(row)
        if len(self._rows) > _MOST_ROWS:
            self._multiply()

    def _multiply(self) -> None:
        """Adds the rows to the pairs."""
        owners = [index for index, row in enumerate(self._rows) for _ in row]
        places = [place for row in self._rows for place in row]
        reached = torch.zeros(len(self._rows), len(VALUES))
        reached[owners, places] = 1.0
        found = (reached.T @ reached).double()
        # Not each document's queries with another's keys.
        found[_QUERIES : _QUERIES + _CLASSES, _KEYS : _KEYS + _CLASSES] = 0.0
        for (queries, keys), count in self._of_documents.items():
            found[_QUERIES + queries, _KEYS + keys] = count
        self._pairs += found
        self._rows.clear()
        self._of_documents.clear()

    def take(self) -> Reached:
        """What was counted since the last time."""
        self._multiply()
        places = self._pairs.triu().nonzero()
        cases = self._pairs[places[:, 0], places[:, 1]].long().tolist()
        pairs = {(VALUES[a], VALUES[b]): n for (a, b), n in zip(places.tolist(), cases, strict=True)}
        lengths = {(OCTAVES[queries], OCTAVES[keys]): count for (queries, keys), count in self._lengths.items()}
        found = Reached(Counter(pairs), Counter(lengths), self._refused)
        self._clear()
        return found
