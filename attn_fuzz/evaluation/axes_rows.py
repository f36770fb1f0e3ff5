"""Rows of the table of axes: each an axis of a case, one of its values, or a question about calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.coverage.axes import Value
from attn_fuzz.oracle.checks import compiled, graphs, streams
from attn_fuzz.oracle.relations.company import PASSES, counted
from attn_fuzz.oracle.relations.merged import MERGED
from attn_fuzz.reference.case import FAR_MEMORIES


def _cases(tally: Tally) -> int:
    return tally.cases


def _number_of(*keys: str) -> Callable[[Tally], int]:
    """Of what is counted, the largest: not every backend has a backward that can be asked."""
    return lambda tally: max(tally.counted.get(key, 0) for key in keys)


@dataclasses.dataclass(frozen=True)
class Row:
    """An axis of a case, one of its values, or a question."""

    name: str
    aim: tuple[Value, ...] = ()
    """What every call has; of several values of an axis any."""
    asked: str = ""
    """What every batch is asked."""
    of_compiled: tuple[Value, ...] = ()
    """What every call has beside, of backends that compile: of these few others can be asked."""
    mode: str = "batch"
    count: Callable[[Tally], int] = _cases
    """How many calls were asked it."""
    drawn: float = 1.0
    """Calls that are drawn for one that is asked: half of a batch's are, of those that can be."""

    def aim_of(self, stated: Capabilities) -> tuple[Value, ...]:
        """What every call of a backend has that states so much."""
        return (*self.aim, *self.of_compiled) if stated.compiles or stated.layouts else self.aim


ROWS: Final = (
    Row("gradient through the LSE", (("LSE gradient", "on"),)),
    Row(
        "parts merged by LSE",
        asked="merging",
        # The first part has no mask, and so would be another configuration of a causal call.
        of_compiled=(("mask", "full"), ("window", "none")),
        count=_number_of(MERGED),
        drawn=7.0,
    ),
    Row("head_dim that is none of the usual ones", (("head_dim", "other"),)),
    Row("values of fewer channels than keys", (("value channels", "fewer"),)),
    Row("values of more channels than keys", (("value channels", "more"),)),
    Row("groups above 8", (("group", "9-"),)),
    Row("a document of thousands of queries", (("queries", "256-"),)),
    Row("rows, heads or bases beyond 2^31 elements", tuple(("memory", name) for name in FAR_MEMORIES)),
    Row("max_seqlen above the longest document", (("max_seqlen", "loose"),)),
    Row("gaps between documents", (("gaps", "queries"), ("gaps", "keys"), ("gaps", "both"))),
    Row(
        "alone and in company",
        asked="company",
        of_compiled=(("memory", "contiguous"),),
        count=_number_of(*map(counted, PASSES)),
        drawn=2.4,
    ),
    Row("CUDA graphs", asked="replayed alike", count=_number_of(graphs.REPLAYED), drawn=3.0),
    Row("streams", asked="ordered by streams", count=_number_of(streams.ORDERED), drawn=2.1),
    Row("torch.compile", asked="compiled alike", count=_number_of(compiled.COMPILED), drawn=1.2),
)
"""In the order in which docs/results.md has them."""
