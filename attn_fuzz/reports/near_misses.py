"""Cases next to a failing one, and what comes of each: what a fault needs shows best by what it lets pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attn_fuzz.reference.case import DTYPES, MAX_HEAD_DIM, Case, CaseError


@dataclasses.dataclass(frozen=True)
class NearMiss:
    """One of them."""

    words: str
    """How it differs."""
    case: Case
    answer: str = ""
    """``right``, the symptom that it shows, ``refused: ...`` or ``not run: ...``."""

    @property
    def right(self) -> bool:
        """Whether it passes."""
        return self.answer == "right"


def _of_lengths(case: Case) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """One token more or less of the longest document, and of its keys."""
    longest = max(range(len(case.lengths)), key=lambda each: case.lengths[each])

    def with_one(values: tuple[int, ...], more: int) -> tuple[int, ...]:
        return tuple(value + more * (place == longest) for place, value in enumerate(values))

    for more, words in ((1, "one more"), (-1, "one less")):
        both: dict[str, Any] = {"lengths": with_one(case.lengths, more)}
        if case.key_lengths is not None:
            yield f"{words} key", {"key_lengths": with_one(case.key_lengths, more)}
            both["key_lengths"] = with_one(case.key_lengths, more)
        yield f"{words} token", both


def _changes(case: Case) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """How neighbours differ, in words and as fields."""
    yield from _of_lengths(case)
    if len(case.lengths) > 1:
        ids = None if case.document_ids is None else case.document_ids[:1]
        keys = None if case.key_lengths is None else case.key_lengths[:1]
        alone = {"lengths": case.lengths[:1], "key_lengths": keys, "document_ids": ids, "padding": 0, "cuts": ()}
        yield "the first document alone", alone
    for head_dim in (case.head_dim - 1, case.head_dim + 1, case.head_dim // 2, 2 * case.head_dim):
        if 1 <= head_dim <= MAX_HEAD_DIM:
            yield f"head_dim {head_dim}", {"head_dim": head_dim}
    yield from ((f"{dtype}", {"dtype": dtype}) for dtype in DTYPES)
    yield "one head", {"heads": 1, "kv_heads": 1}
    yield "as many K/V heads as heads", {"kv_heads": case.heads}
    yield "no window", {"window": (-1, -1)}
    yield "not causal" if case.causal else "causal", {"causal": not case.causal}
    yield "no softcap", {"softcap": 0.0}
    yield "the usual scale", {"scale": None}
    yield "no gradient of the LSE", {"lse_gradient": False}
    yield "values as wide as keys", {"head_dim_v": None}
    yield "contiguous memory", {"memory": "contiguous"}
    yield "no rows behind the documents", {"capacity": 0}
    yield "no rows between documents", {"gaps": (0, 0)}
    yield "max_seqlen of the longest document", {"loose_max_seqlen": (0, 0)}
    yield "no cuts", {"cuts": ()}
    yield "no padding", {"padding": 0}
    yield "one rank", {"ranks": 1, "tensor_ranks": 1}
    yield "no past: as many keys as queries", {"key_lengths": None}
    yield "no rotary", {"rotary": "none"}
    yield "no norms", {"query_norm": "none", "key_norm": "none", "value_norm": "none"}
    yield "other values", {"seed": case.seed ^ 1}


def neighbours(case: Case) -> list[NearMiss]:
    """Cases that differ from one in one respect each; those that cannot be are left out."""
    found: dict[str, NearMiss] = {}
    for words, changes in _changes(case):
        try:
            other = case.replace(**changes)
        except CaseError:
            continue
        if other != case:
            found.setdefault(other.to_json(), NearMiss(words, other))
    return list(found.values())


def answered(case: Case, answer: Callable[[Case], str]) -> list[NearMiss]:
    """The neighbours of a case with what came of them, those that pass first.

    Args:
        case: that fails.
        answer: says what comes of a case, as ``NearMiss.answer`` has it.
    """
    every = [dataclasses.replace(each, answer=answer(each.case)) for each in neighbours(case)]
    return sorted(every, key=lambda each: (not each.right, each.answer.startswith("refused")))
