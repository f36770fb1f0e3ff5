"""What campaigns have counted of questions that are no verdict: how often, and how it went, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attn_fuzz.oracle.relations.company import PASSES, counted


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
