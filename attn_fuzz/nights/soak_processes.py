"""The processes of a campaign, found by what their environment has, and their memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

TOKEN: Final = "ATTN_FUZZ_SOAK"
"""An environment variable that all processes of a campaign have."""


def processes(token: str) -> dict[int, int]:
    """Processes whose environment has the token, with their parents."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{TOKEN}={token}".encode() in (folder / "environ").read_bytes():
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                if status[0] != "Z":
                    found[int(folder.name)] = int(status[1])
        except OSError:
            # It has just ended.
            continue
    return found


def memory_of(pid: int) -> int:
    """Bytes of a process that are in memory; 0 for one that is no more."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
