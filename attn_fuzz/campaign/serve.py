"""What a worker process of a campaign does: its assignment, by its mode."""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from typing import Final

from attn_fuzz.campaign.calls_worker import work_on_batches
from attn_fuzz.campaign.endings import INTERRUPTED
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.campaign.notes import noting
from attn_fuzz.campaign.packed_worker import work_on_packed
from attn_fuzz.campaign.worker import work
from attn_fuzz.execution.process import limit_memory, not_its_doing, set_apart, stay_on

WORK: Final = {"case": work, "batch": work_on_batches, "packed": work_on_packed}
"""What each mode does with an assignment."""


def serve(assignment: Assignment, connection: Connection, processors: frozenset[int] | None) -> None:
    """Main function of a worker process.

    Args:
        assignment: what to do.
        connection: where its messages go.
        processors: those that it stays on; None for any.
    """
    set_apart()
    if assignment.memory:
        limit_memory(assignment.memory)
    if processors is not None:
        stay_on(processors)
    send = noting(assignment, connection.send) if assignment.notes else connection.send
    try:
        # Of a broken pipe the parent is gone, and so is anybody who could read this.
        with not_its_doing(), contextlib.suppress(BrokenPipeError):
            WORK[assignment.mode](assignment, send)
    except KeyboardInterrupt:
        # Of Ctrl-C the parent hears, too; of a kernel that raises it, by this alone.
        raise SystemExit(INTERRUPTED) from None
    finally:
        connection.close()
