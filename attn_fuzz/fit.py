"""Makes layouts fit: ranks take equal shares of every micro-sequence, so its tokens must be a multiple of them."""

from __future__ import annotations

from collections.abc import Sequence


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
