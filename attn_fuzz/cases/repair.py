"""Makes layouts fit: ranks take equal shares of every micro-sequence, so its tokens must be a multiple of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_fuzz.reference.case import Case, CaseError


def fitted(ranks: int, lengths: Sequence[int], padding: int, cuts: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(padding, cuts) with which so many ranks can share documents of these lengths.

    Padding becomes a little less where there is enough of it, otherwise more; cuts move back to multiples of the ranks,
    and those that would leave a micro-sequence without tokens are dropped.

    Args:
        ranks: how many.
        lengths: tokens of each document.
        padding: tokens behind them.
        cuts: where micro-sequences end.
    """
    over = (sum(lengths) + padding) % ranks
    padding += -over if padding >= over else ranks - over
    total = sum(lengths) + padding
    if ranks > 1 and not total:
        padding = total = ranks
    moved = {cut // ranks * ranks for cut in cuts}
    return padding, tuple(sorted(cut for cut in moved if 0 < cut < total))


def changed(case: Case, **changes: Any) -> Case | None:
    """The case with some fields changed, and padding and cuts such that its ranks can share it; None if impossible.

    Nor may padding take the place of what was taken away: documents are what people read.
    """
    if case.level == "layer":
        now = {**vars(case), **changes}
        ranks = now["ranks"] * now["tensor_ranks"]
        changes["padding"], changes["cuts"] = fitted(ranks, now["lengths"], now["padding"], now["cuts"])
    try:
        other = case.replace(**changes)
    except CaseError:
        return None
    replaced = other.padding > case.padding and other.tokens >= case.tokens
    return None if replaced and other.all_ranks == case.all_ranks else other
