"""What each mode draws and asks at each level: where a value of an axis may occur at all."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final, NamedTuple

from attn_fuzz.batch.judge import schedule_on
from attn_fuzz.batch.layer_judge import LAYER_SCHEDULE
from attn_fuzz.batch.packed import PACKED_SCHEDULE
from attn_fuzz.coverage.axes import AXES, DOCUMENTS, LENGTHS, QUESTIONS, class_of, probe_name
from attn_fuzz.generation import calls, layer_calls, length_sweeps
from attn_fuzz.generation.layouts import FEW_KEYS, LONG_LAYERS, LONG_ROWS, MANY, PASTS
from attn_fuzz.oracle.checks import PROBES
from attn_fuzz.reference.case import MAX_HEAD_DIM

_LENGTH_CLASSES: Final = next(axis.values for axis in AXES if axis.name == "queries")
_DOCUMENT_CLASSES: Final = next(axis.values for axis in AXES if axis.name == "documents")


class Place(NamedTuple):
    """A mode and a level, and what occurs there."""

    mode: str
    level: str
    lengths: frozenset[tuple[str, str]]
    """Classes of (queries, keys) of a document."""
    documents: frozenset[str]
    questions: frozenset[str]
    widest: int = MAX_HEAD_DIM
    """The largest head dimension."""

    def has(self, chosen: Mapping[str, str]) -> bool:
        """Whether a value or two, by axis, may occur here."""
        return (
            chosen.get("mode", self.mode) == self.mode
            and chosen.get("level", self.level) == self.level
            and ("documents" not in chosen or chosen["documents"] in self.documents)
            and ("question" not in chosen or chosen["question"] in self.questions)
            and (not (dim := chosen.get("head_dim", "")).isdigit() or int(dim) <= self.widest)
            and any(
                chosen.get("queries", queries) == queries and chosen.get("keys", keys) == keys
                for queries, keys in self.lengths
            )
        )


def _rectangle(queries: tuple[int, int], keys: tuple[int, int]) -> set[tuple[str, str]]:
    """Classes of lengths between bounds, both included."""
    sides = [range(class_of(low, LENGTHS), class_of(high, LENGTHS) + 1) for low, high in (queries, keys)]
    return {(_LENGTH_CLASSES[q], _LENGTH_CLASSES[k]) for q in sides[0] for k in sides[1]}


def _layers(longest: int) -> frozenset[tuple[str, str]]:
    """Of active documents of layers: at least one row, which sees itself and what stands before it."""
    return frozenset(
        (queries, keys)
        for queries, keys in _rectangle((1, longest), (1, longest))
        if _LENGTH_CLASSES.index(queries) <= _LENGTH_CLASSES.index(keys)
    )


def _swept(longest: tuple[tuple[int, int], ...]) -> frozenset[tuple[str, str]]:
    """Of calls in batches and packed calls: every pair up to the longest, and long rows over few keys."""
    queries, keys = (max(side) for side in zip(*longest, strict=True))
    return frozenset(_rectangle((0, queries), (0, keys)) | _rectangle((min(LONG_ROWS), max(LONG_ROWS)), (1, FEW_KEYS)))


def _drawn() -> frozenset[tuple[str, str]]:
    """Of single kernel calls: all but what costs the product of two large numbers, or has no queries but many keys."""
    every = _rectangle((0, max(LONG_ROWS)), (0, max(PASTS)))
    past = {("0", keys) for keys in _LENGTH_CLASSES if keys in _LENGTH_CLASSES[-2:]}
    return frozenset(every - past)


def _documents(fewest: int, most: int) -> frozenset[str]:
    return frozenset(_DOCUMENT_CLASSES[class_of(fewest, DOCUMENTS) : class_of(most, DOCUMENTS) + 1])


_FEWEST_PACKED: Final = {"kernel": 5, "layer": 17}
"""Documents of a packed call: 64 at first, of kernel calls an eighth of them where they have 128 heads."""


@functools.cache
def places(device: str) -> tuple[Place, ...]:
    """All of them.

    Args:
        device: ``cpu`` or ``cuda``: batches of GPUs have longer documents.
    """
    swept, layers = length_sweeps.LONGEST[device], layer_calls.LONGEST[device]
    probes = frozenset(map(probe_name, PROBES))
    of_calls, of_layers, of_packed = (
        frozenset(question.asked for question in schedule if question.asked in QUESTIONS)
        for schedule in (schedule_on(device), LAYER_SCHEDULE, PACKED_SCHEDULE)
    )
    most = 1 << 14
    return (
        Place("case", "kernel", _drawn(), _documents(1, max(MANY)), probes),
        Place("case", "layer", _layers(max(LONG_LAYERS)), _documents(1, max(MANY)), probes),
        Place("batch", "kernel", _swept(calls.LONGEST[device]), _documents(1, max(calls.DOCUMENTS)), of_calls),
        Place(
            "batch",
            "layer",
            _layers(max(layers)),
            _documents(1, layer_calls.MOST_DOCUMENTS),
            of_layers,
            layer_calls.MOST_WIDTH[device],
        ),
        Place("packed", "kernel", _swept(swept), _documents(_FEWEST_PACKED["kernel"], most), of_packed),
        Place(
            "packed",
            "layer",
            _layers(max(queries for queries, _ in swept)),
            _documents(_FEWEST_PACKED["layer"], most),
            frozenset(),
        ),
    )
