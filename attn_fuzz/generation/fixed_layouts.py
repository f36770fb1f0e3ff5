"""Layouts for backends that compile for shapes: a small fixed set, so that each is compiled once.

A layout is drawn by its number alone and made from it by a generator of its own, the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from attn_fuzz.backends.kernel import Capabilities

_LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
_LONG = (127, 128, 129, 200)


def _source(number: int, what: str) -> random.Random:
    return random.Random(f"{what} of layout {number}")


def pooled_lengths(number: int, capabilities: Capabilities) -> list[int]:
    """Lengths of a layout's documents: one to six, a long one in every fourth layout."""
    source = _source(number, "lengths")
    lengths = [source.choice(_LENGTHS) for _ in range(source.randint(1, 6))]
    if number % 4 == 3:
        lengths.insert(source.randint(0, len(lengths)), source.choice(_LONG))
    if capabilities.empty_documents and number % 3 == 2:
        lengths.insert(source.randint(0, len(lengths)), 0)
    return lengths


def pooled_keys(number: int, lengths: Sequence[int], capabilities: Capabilities, *, causal: bool) -> list[int]:
    """Keys of a layout's documents: with a past in every other layout, fewer keys than queries in some."""
    source = _source(number, "keys")
    if number % 2 == 0 or (causal and capabilities.causal_needs_equal_lengths):
        return list(lengths)
    fewer = capabilities.queries_without_keys or not causal
    smallest = 0 if capabilities.queries_without_keys else 1
    keys = []
    for length in lengths:
        past = source.choice((0, 1, 9, 64))
        if not capabilities.keys_without_queries and length == 0:
            past = 0
        shorter = fewer and length > smallest and source.random() < 0.25
        keys.append(source.randint(smallest, length) if shorter else length + past)
    return keys


def pooled_cuts(number: int, lengths: Sequence[int], *, causal: bool) -> tuple[int, ...]:
    """Where a layout is cut into micro-sequences: up to two places."""
    source = _source(number, "cuts")
    total = sum(lengths)
    places = list(range(1, total)) if causal else sorted({end for end in accumulate(lengths) if 0 < end < total})
    return tuple(sorted(source.sample(places, min(len(places), source.randint(0, 2)))))
