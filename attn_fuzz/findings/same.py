"""Which findings are one bug: seen by two modes, at two levels, or in two campaigns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from attn_fuzz.findings.finding import Finding
from attn_fuzz.reference.case import Case

_OF_MANY: Final = ("batch", "packed")
"""Checks of modes whose cases stay as large as the calls that they were seen in."""


def tensor_of(finding: Finding) -> str:
    """What is wrong; empty where the finding does not say."""
    return str(finding.symptoms[0].get("tensor", "")) if finding.symptoms else ""


def needs(case: Case) -> dict[str, Any]:
    """What a shrunk case shows that its bug needs, in words that kernel and layer cases share: no sizes."""
    return {
        "past": bool(case.cuts) or case.packed_lengths != case.packed_key_lengths,
        "documents": len(case.packed_lengths) > 1,
        "causal": case.causal,
        "window": case.window != (-1, -1),
        "scale": case.scale is not None,
        "softcap": case.softcap != 0,
        "grouped heads": case.heads != case.kv_heads,
        "dtype": case.dtype,
        "memory": case.memory,
        "capacity": case.capacity > 0,
        "ranks": case.all_ranks > 1,
        "gradient of the LSE": case.lse_gradient,
        "max_seqlen": case.loose_max_seqlen != (0, 0),
        "gaps": case.gaps != (0, 0),
        "values of another head_dim": case.head_dim_v is not None,
    }


def is_same(first: Finding, later: Finding) -> bool:
    """Whether two findings are taken for one bug: backend, symptom and tensor are the same, and so is what it needs."""
    kinds = [(each.backend, each.root, each.symptom, tensor_of(each), each.sequence is None) for each in (first, later)]
    if kinds[0] != kinds[1] or not tensor_of(first):
        return False
    mine, other = needs(first.case), needs(later.case)
    if {*first.checks, *later.checks} & set(_OF_MANY):
        # As it was seen among many documents, of which most have a past.
        for word in ("documents", "past"):
            del mine[word], other[word]
    return mine == other


def first_of(finding: Finding, earlier: Iterable[Finding]) -> str:
    """The id of the first of earlier findings that is the same bug, or nothing."""
    return next(
        (other.same_as or other.id for other in earlier if other.id != finding.id and is_same(other, finding)), ""
    )


def count_bugs(findings: Sequence[Finding]) -> int:
    """How many findings there are, each bug counted once."""
    return len({finding.same_as or finding.id for finding in findings})
