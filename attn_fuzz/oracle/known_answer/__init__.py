"""Inputs whose right results are known, exactly or to a bound, and how far from them correct arithmetic may be.

Each is made, and judged, for all documents of a call at once, be they one or thousands. Adding one to what is asked of
kernels is writing one such class and listing it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from attn_fuzz.oracle.known_answer.census import Census
from attn_fuzz.oracle.known_answer.compared import KnownAnswer
from attn_fuzz.oracle.known_answer.every_row import EveryRow
from attn_fuzz.oracle.known_answer.needle import Needle
from attn_fuzz.oracle.known_answer.swamping import Swamping
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

KNOWN_ANSWERS: Final[dict[str, Callable[[Case, torch.device, Profile], KnownAnswer | None]]] = {
    "keys": Census.of,
    "needle": Needle.of,
    "every row": EveryRow.of,
    "swamping": Swamping.of,
}
"""From a kernel case, a device and how a backend computes to inputs; None where a case has none of the kind."""

__all__ = ["KNOWN_ANSWERS"]
