"""Alone or in company: a document gives the same results whichever others are in its call (batch invariance).

Kernels choose tiles, splits of the keys and shortcuts by the longest document, by how many there are, and by all tokens
together. With each choice sums are rounded in another order, and what serving samples or training reproduces depends on
who else was there. That is within the budget, and wrong only where a backend promises that it is not so.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Final

import torch

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.subsets import subset
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.layout import borders

PASSES: Final[dict[str, tuple[str, ...]]] = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}
"""Results by the pass that they come of."""

_LONGER: Final = 64
"""So many tokens longer than all others is the longest of a crowd: another tile, and another ``max_seqlen``."""

_LONGEST: Final = 256
"""The longest that it gets: beside documents that are longer themselves, the others are what is different."""


def counted(which: str, *, moved: bool = False) -> str:
    """What documents are counted as that were run in company, by pass, and those of them that gave other bits."""
    return f"company {which}" + (", other bits" if moved else "")


def promised(stated: Capabilities, name: str) -> bool:
    """Whether a result is stated to have the same bits in any company."""
    return stated.batch_invariant and (name in PASSES["forward"] or stated.batch_invariant_backward)


def asked_of(case: Case, backend: Backend, device: str) -> bool:
    """Whether a backend is asked about company in a case; of what compiles for shapes, rows lie in their usual way.

    Args:
        case: what is run.
        backend: what runs it.
        device: its kind, ``cpu`` or ``cuda``.
    """
    # What torch compiles would be compiled once more for each company.
    if case.level != "kernel" or backend.kernel.compiled:
        return False
    return not backend.kernel.capabilities_on(device).layouts or case.memory == "contiguous"


def chosen(case: Case, *, layouts: bool = False) -> int | None:
    """The document that is looked at; None where no document has queries and keys.

    Args:
        case: whose documents.
        layouts: the longest one, so that there are as many shapes of it as layouts; otherwise another for every seed.
    """
    pairs = list(zip(case.packed_lengths, case.packed_key_lengths, strict=True))
    some = [place for place, (queries, keys) in enumerate(pairs) if queries and keys]
    # Rows of one allocation are not a document's own.
    if not some or case.memory == "broadcast":
        return None
    return max(some, key=lambda place: (*pairs[place], -place)) if layouts else some[case.seed // 5 % len(some)]


@dataclasses.dataclass(frozen=True)
class Pack:
    """A call that the document is in."""

    case: Case
    place: int
    """Which of its documents it is."""

    def rows(self, name: str) -> slice:
        """The document's rows of a result."""
        lengths = self.case.packed_key_lengths if name in ("dk", "dv") else self.case.packed_lengths
        begin, end = borders(lengths)[self.place : self.place + 2]
        return slice(begin, end)

    def own(self, results: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
        """The document's part of a result; None where there is none, or its rows are not there."""
        rows, got = self.rows(name), results.get(name)
        return None if got is None or len(got) < rows.stop else got[rows]


def alone(case: Case, place: int) -> Pack | None:
    """The document by itself."""
    small = subset(case, [place])
    return None if small is None else Pack(small, 0)


def packs(case: Case, place: int, *, layouts: bool = False) -> Iterator[Pack]:
    """Another call with the document: the same others in another order, or others that no case has drawn.

    Which of them, the case's seed says: a run costs about as much as all that its results are held to.

    Args:
        case: what is run.
        place: of the document.
        layouts: the same others in any case, of what compiles for shapes.
    """
    rest = [other for other in range(len(case.packed_lengths)) if other != place]
    # Last where it was not, and else first, with the others the other way round.
    order = [place, *reversed(rest)] if rest and place > rest[-1] else [*reversed(rest), place]
    turned = subset(case, order) if rest and (layouts or case.seed & 1) else None
    if turned is not None:
        yield Pack(turned, order.index(place))
    elif not layouts and (crowd := _crowd(case, place)) is not None:
        yield Pack(crowd, 1)


def _crowd(case: Case, place: int) -> Case | None:
    """The document between a longer one and one of a single token."""
    longest = min(max(*case.packed_lengths, *case.packed_key_lengths) + _LONGER, _LONGEST)
    taken = frozenset(case.packed_ids)
    before, behind = itertools.islice((name for name in itertools.count() if name not in taken), 2)
    queries, keys = case.packed_lengths[place], case.packed_key_lengths[place]
    try:
        return case.replace(
            lengths=(longest, queries, 1),
            key_lengths=None if case.key_lengths is None else (longest, keys, 1),
            document_ids=(before, case.packed_ids[place], behind),
        )
    except CaseError:
        return None
