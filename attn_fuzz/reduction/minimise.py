"""Makes a failing case small: fewer ranks, fewer and shorter documents, then every option back to its simplest value.

Hypothesis shrinks what it drew; this works on any case, wherever it came from, and ends at one from which no document
can be removed or shortened by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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
from attn_fuzz.reference.case import Case

Fails = Callable[[Case], bool]


PASSES = (
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


def minimise(case: Case, fails: Fails, seconds: float = 60.0, clock: Callable[[], float] = time.process_time) -> Case:
    """The smallest case found that still fails in the same way.

    Args:
        case: a failing case.
        fails: whether a case fails in the same way; never called twice with the same case.
        seconds: by the clock; what has been reached by then is returned.
        clock: processor time, so that a busy machine shrinks as far as an idle one. Who waits for other processes
            needs another.
    """
    deadline = clock() + seconds
    tried = {case}
    improved = True
    while improved:
        improved = False
        for step in PASSES:
            progress = True
            while progress:
                progress = False
                for candidate in step(case):
                    if clock() > deadline:
                        return case
                    if candidate is None or candidate in tried:
                        continue
                    tried.add(candidate)
                    if fails(candidate):
                        case, progress, improved = candidate, True, True
                        break
    return case
