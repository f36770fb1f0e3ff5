"""What campaigns have counted of questions that are no verdict: how often, and how it went, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from attn_fuzz.oracle.checks import compiled, graphs, streams
from attn_fuzz.oracle.relations.company import PASSES, counted
from attn_fuzz.oracle.relations.merged import MERGED

_COUNTED: Final = {
    "same in company": tuple(map(counted, PASSES)),
    "company": tuple(map(counted, PASSES)),
    "replayed alike": (graphs.REPLAYED, graphs.REFUSED),
    "ordered by streams": (streams.ORDERED,),
    "parts merge": (MERGED,),
    "merging": (MERGED,),
    "compiled alike": (compiled.COMPILED, compiled.REFUSED),
}
"""Of questions that not every backend can be asked: how counts begin of those that were."""


def never_asked(asked: Sequence[str], counts: Sequence[Mapping[str, int]]) -> Iterator[str]:
    """A sentence for each question that was named, and that nobody could be asked.

    Args:
        asked: questions that were named.
        counts: of all backends.
    """
    seen = {key for each in counts for key, number in each.items() if number}
    for name in asked:
        if name in _COUNTED and not any(key.startswith(_COUNTED[name]) for key in seen):
            yield f"no case that was drawn could be asked {name.replace(' ', '-')}, so that was not tested"


def counted_lines(counts: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each question of which there is a count.

    Args:
        counts: of one backend (``campaign.messages.Tally.counted``).
    """
    passes = [which for which in PASSES if counts.get(counted(which))]
    if passes:
        told = [f"{counts.get(counted(which, moved=True), 0)} of {counts[counted(which)]} {which}" for which in passes]
        yield f"documents with other bits in other company: {', '.join(told)}"
    for key, number in sorted(counts.items()):
        if not key.startswith("company "):
            yield f"{key}: {number}"
