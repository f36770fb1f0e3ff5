"""An earlier sequence: what an object that takes several has seen before the case under test."""

from __future__ import annotations

from typing import Any, Final

from attn_fuzz.reference.case import Case

_OTHER_SEED: Final = 0x2545F491
_MORE: Final = 3
"""Tokens of the document that the earlier sequence has more, where it is the longer one."""


def earlier_sequence(case: Case) -> Case:
    """Other documents and values of the same configuration, in one micro-sequence or, where it may be cut, two.

    It is longer than the case, with a document more in front, or a document or token shorter: rows, steps and lengths
    that are left over matter where they are more, and what was made to measure where they are fewer. A bit of the
    case's seed decides, which the second value seed leaves as it is.

    Args:
        case: a layer case on one rank.
    """
    changes: dict[str, Any] = {"seed": case.seed ^ _OTHER_SEED, "document_ids": None}
    if not case.seed & 4:
        lengths = (_MORE, *reversed(case.lengths))
    elif case.lengths[0] and sum(case.lengths[1:]):
        lengths = case.lengths[1:]
    else:
        # Of one token there is none shorter.
        lengths = tuple(length - 1 if length == max(case.lengths) > 1 else length for length in case.lengths)
    # Padding between documents of its own, by their places.
    changes["padding_ids"] = tuple(place for place in case.padding_ids if place < len(lengths) - 1)
    tokens = sum(lengths) + case.padding
    cuts = (tokens // 2,) if case.cuts and case.causal and tokens > 1 else ()
    return case.replace(lengths=lengths, cuts=cuts, **changes)
