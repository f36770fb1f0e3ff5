"""How the C library of a new process hands out memory: set in its environment, which it reads once, when it starts.

Nothing here imports torch, so that processes can be started before this one has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_UNCACHED: Final = "glibc.malloc.tcache_count=0"
"""Has glibc fill small blocks for certain: some of its versions take those from a cache of freed ones, as they are."""

_KEEPS_BLOCKS: Final = {name: str(1 << 30) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
"""glibc returns large blocks to the system at once, and faulting them in again costs more than the reference."""


def fill_in_children(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process so that glibc fills small blocks there, too."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "tcache_count" in tunables:
        return {}
    return {"GLIBC_TUNABLES": f"{tunables}:{_UNCACHED}" if tunables else _UNCACHED}


def keep_in_children(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to it so that glibc keeps large blocks; what the caller has set of these stays."""
    return {name: value for name, value in _KEEPS_BLOCKS.items() if name not in environment}
