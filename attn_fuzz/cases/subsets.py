"""Some of the documents of a case, as a case of their own."""

from __future__ import annotations

from collections.abc import Iterable

from attn_fuzz.cases.smaller import with_lengths
from attn_fuzz.reference.case import Case, CaseError


def subset(case: Case, places: Iterable[int]) -> Case | None:
    """The case with some of its documents only, each under its own name and so with its own values, cuts with them."""
    kept = list(places)
    if case.level == "layer":
        return with_lengths(case, [case.lengths[i] for i in kept], kept, None)
    lengths, keys, ids = case.packed_lengths, case.packed_key_lengths, case.packed_ids
    if not any(keys[i] for i in kept):
        # The case mode draws no call without a key, and its needle has none to point at.
        return None
    try:
        return case.replace(
            lengths=tuple(lengths[i] for i in kept),
            key_lengths=tuple(keys[i] for i in kept),
            document_ids=tuple(ids[i] for i in kept),
        )
    except CaseError:
        return None
