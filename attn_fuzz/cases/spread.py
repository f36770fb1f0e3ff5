"""Cases whose slices of micro-sequences have the sizes that a layer over ranks needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attn_fuzz.cases.repair import fitted
from attn_fuzz.reference.case import Case, CaseError

Offers = Callable[[Case], Iterator[Case | None]]
"""Candidates that are made of a case."""


def in_multiples(case: Case, multiple: int) -> Case | None:
    """The case with every rank's slice of every micro-sequence a multiple of so many tokens; None if impossible.

    Padding and cuts change. A non-causal cut has to stay where a document ends, and is dropped where that does not fit.
    """
    if case.level != "layer" or multiple == 1:
        return case
    together = multiple * case.all_ranks
    cuts = case.cuts if case.causal else tuple(cut for cut in case.cuts if cut % together == 0)
    padding, cuts = fitted(together, case.lengths, case.padding, cuts)
    try:
        return case.replace(padding=padding, cuts=cuts)
    except CaseError:
        return None


def offered_in_multiples(offers: Offers, multiple: int) -> Offers:
    """The same candidates, made to fit."""

    def fitting(case: Case) -> Iterator[Case | None]:
        for candidate in offers(case):
            yield None if candidate is None else in_multiples(candidate, multiple)

    return fitting
