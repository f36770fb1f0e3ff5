"""Makes a failing case small: fewer ranks, fewer and shorter documents, then every option back to its simplest value.

Hypothesis shrinks what it drew; this works on any case, wherever it came from, and ends at one from which no document
can be removed or shortened by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from attn_fuzz.cases.order import simplicity
from attn_fuzz.cases.simpler import narrower, simpler_options
from attn_fuzz.cases.smaller import (
    fewer_documents,
    fewer_ranks,
    merged_documents,
    shorter_documents,
    shorter_everywhere,
    shorter_micro_sequences,
    simpler_cuts,
    tiny_layouts,
)
from attn_fuzz.cases.spread import offered_in_multiples
from attn_fuzz.reduction.reduce import Deadline, Pass, reduce
from attn_fuzz.reference.case import Case

Fails = Callable[[Case], bool]


PASSES: Final[tuple[Pass[Case], ...]] = (
    fewer_ranks,
    tiny_layouts,
    fewer_documents,
    # Early, because a plain case costs less to try, and so do all that come from it.
    narrower,
    simpler_options,
    shorter_micro_sequences,
    shorter_everywhere,
    shorter_documents,
    merged_documents,
    simpler_cuts,
)


def minimise(
    case: Case,
    fails: Fails,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.process_time,
    *,
    multiple: int = 1,
) -> Case:
    """The smallest case found that still fails in the same way.

    Args:
        case: a failing case.
        fails: whether a case fails in the same way; never called twice with the same case.
        seconds: by the clock; what has been reached by then is returned.
        clock: processor time, so that a busy machine shrinks as far as an idle one. Who waits for other processes
            needs another.
        multiple: tokens of which every rank's slice of every micro-sequence has to have a multiple.
    """
    passes = PASSES if multiple == 1 else [offered_in_multiples(offers, multiple) for offers in PASSES]
    return reduce(case, passes, fails, simplicity, Deadline.after(seconds, clock))
