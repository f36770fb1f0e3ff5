"""What ``campaign --ray`` is asked for, and what can be said of coverage where other machines have the backends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.registry import UnknownBackend, users
from attn_fuzz.cli.arguments import UsageError, modes_of
from attn_fuzz.nights import holes
from attn_fuzz.nights.database import Database
from attn_fuzz.nights.machines import ClusterWishes
from attn_fuzz.nights.totals import pairs_of

_KINDS: Final = ("cuda", "cpu")

_SECONDS: Final = 10.0
"""For which a share is taken to be what it was: machines hand over as often."""


def cluster_wishes(
    devices: Sequence[str] | None,
    backends: Sequence[str] | None,
    levels: Sequence[str],
    mode: str,
    workers: int | None,
    seed: int,
    seconds: float | None,
) -> ClusterWishes:
    """What machines are asked for.

    Raises:
        UsageError: for a single GPU, which Ray places, and for a kernel of one's own, whose file other machines do not
            have.
    """
    for device in devices or ():
        if device not in _KINDS:
            raise UsageError(f"with --ray a device is cpu or cuda, and not {device!r}: Ray places work on GPUs")
    for name in backends or ():
        if users(name) is not None:
            raise UsageError(f"{name} is a file of this machine; --ray takes backends that every machine has")
    modes_of(mode)
    kinds = tuple(dict.fromkeys(devices or _KINDS))
    return ClusterWishes(kinds, tuple(dict.fromkeys(backends or ())), tuple(levels), mode, workers, seed, seconds)


class Covered:
    """Shares of coverage by what a database holds.

    Args:
        database: of the campaign.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[str, str], tuple[float, float]] = {}
        """When each was looked up, and what it was."""

    def share(self, subject: tuple[str, str]) -> float:
        """Of a backend on a kind of device; 0 where this machine cannot say what it might be asked for."""
        at, found = self._known.get(subject, (float("-inf"), 0.0))
        if time.monotonic() - at > _SECONDS:
            try:
                found = holes.share(pairs_of(self._database, *subject), *subject)
            except (BackendUnavailable, UnknownBackend):
                found = 0.0
            self._known[subject] = time.monotonic(), found
        return found
