"""What a soak must have found: every planted fault, kept and shrunk, and nobody else accused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attn_fuzz.cases.order import simplicity, tokens
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.nights.soak_kernels import FOUND, MODULE, TOKENS


def is_shrunk(finding: Finding, least: int) -> bool:
    """Whether a case has at most twice as many tokens as the smallest in which a fault can be seen.

    Args:
        finding: shrunk or not.
        least: query tokens of the smallest case.
    """
    return tokens(finding.case) <= 2 * least


def stored(store: Path, unreadable: list[str]) -> Iterator[Finding]:
    """All findings of a store.

    Args:
        store: its folder.
        unreadable: gets a sentence for each that cannot be read.
    """
    found = Store(store)
    for identifier in found.identifiers():
        try:
            yield found.load(identifier)
        except StoreError as error:
            unreadable.append(str(error))


def planted(findings: Sequence[Finding]) -> dict[str, dict[str, Any]]:
    """Of each fault that has to be found: whether it was kept, whether it was shrunk, and the smallest case."""
    told = {}
    for name, symptom in FOUND.items():
        mine = [each for each in findings if (each.backend, each.symptom) == (f"{MODULE}:{name}", symptom)]
        best = min(mine, key=lambda each: simplicity(each.case), default=None)
        told[name] = {
            "symptom": symptom,
            "kept": best is not None,
            "shrunk": any(is_shrunk(each, TOKENS[name]) for each in mine),
            "case": None if best is None else best.case.to_dict(),
            "tokens_drawn": None if best is None else best.original_case.tokens,
        }
    return told


def others(findings: Sequence[Finding]) -> list[str]:
    """Who else was accused, in sentences: backends that do nothing wrong, and planted ones of dying or hanging."""
    wrong = []
    for finding in findings:
        name = finding.backend.removeprefix(f"{MODULE}:")
        if name not in FOUND or (finding.symptom in ("Crashed", "Hung") and finding.symptom != FOUND[name]):
            wrong.append(f"{name} was accused of {finding.symptom} ({finding.id})")
    return wrong
