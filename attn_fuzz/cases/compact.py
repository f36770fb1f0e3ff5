"""A kernel call laid out plainly: with bounds of its longest document, nothing between documents, rows together."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from attn_fuzz.reference.case import FAR_MEMORIES, Case

_PLAIN: Final[dict[str, tuple[str, Any]]] = {
    "max_seqlen": ("loose_max_seqlen", (0, 0)),
    "gaps": ("gaps", (0, 0)),
    "far": ("memory", "contiguous"),
}
"""Which field changes to what, by what is laid out plainly (``backends.kernel.PLACEMENTS``)."""


def compact(case: Case, kinds: Collection[str]) -> Case:
    """The same documents and values, plain in those respects; itself where it is already.

    Args:
        case: of kernel level.
        kinds: of ``backends.kernel.PLACEMENTS``.
    """
    changes = dict(_PLAIN[kind] for kind in kinds if kind != "far" or case.memory in FAR_MEMORIES)
    return case.replace(**changes) if any(getattr(case, name) != value for name, value in changes.items()) else case
