"""Findings of a night: stored at once, each bug once and as small as it was seen, however often that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from attn_fuzz.campaign.isolated import FATAL
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.ledger import Ledger
from attn_fuzz.findings.signature import Signature
from attn_fuzz.findings.store import Store, StoreError

OFTEN: Final = 2
"""A symptom that a backend has shown so often at a level is shrunk again in one slice of ``LOOK_AGAIN`` only."""

LOOK_AGAIN: Final = 16

SMALL: Final = 16
"""Tokens of a case that nobody would want smaller."""


class Kept:
    """The findings of one campaign.

    Args:
        store: where they go; prepared.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.findings: dict[str, Finding] = {}
        """By id: one of each bug, the smallest."""
        self.troubles: list[str] = []
        """Why findings could not be stored."""
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._fatal: dict[tuple[str, str], Finding] = {}
        self._ledger = Ledger(store.folder)
        self._had = frozenset(self._ledger.written())
        for stored in map(self._loaded, store.identifiers()):
            if stored is not None:
                self._note_fatal(stored)

    def keep(self, finding: Finding) -> bool:
        """Stores a finding, unless the store has the same bug with a case that is no larger.

        Returns:
            Whether the store had none like it.
        """
        self._seen[finding.backend, finding.case.level, finding.symptom] += 1
        self._note_fatal(finding)
        placed = self.store.linked(self.store.placed(finding))
        self._note(placed)
        new = not placed.same_as and placed.id not in self.store.identifiers()
        if placed.same_as:
            earlier = self._loaded(placed.same_as)
            if earlier is not None and earlier.case.tokens <= placed.case.tokens:
                self._count(earlier)
                return False
        try:
            self.store.save(placed)
        except StoreError as error:
            # The campaign goes on; what it found is printed at its end.
            self.troubles.append(str(error))
        self._count(placed)
        return new

    def new(self, findings: Iterable[Finding]) -> list[Finding]:
        """Those whose signatures the ledger did not have when the campaign began."""
        return [finding for finding in findings if Signature.of(finding).id not in self._had]

    def _note(self, finding: Finding) -> None:
        """Counts a finding in the ledger."""
        try:
            self._ledger.note(finding)
        except StoreError as error:
            self.troubles.append(str(error))

    def _note_fatal(self, finding: Finding) -> None:
        """Remembers the smallest case that ends a backend's process, and that makes it hang."""
        key = finding.backend, finding.symptom
        # One that is not shrunk yet is looked into when it comes up again.
        if finding.symptom in FATAL and (finding.case != finding.original_case or finding.case.tokens <= SMALL):
            other = self._fatal.get(key)
            if other is None or finding.case.tokens < other.case.tokens:
                self._fatal[key] = finding

    def fatal(self) -> list[Finding]:
        """Of each backend the smallest case that ends its process, and that makes it hang, where there is one."""
        return list(self._fatal.values())

    def _loaded(self, identifier: str) -> Finding | None:
        try:
            return self.store.load(identifier)
        except StoreError:
            return None

    def _count(self, finding: Finding) -> None:
        """Notes which finding stands for a bug in this campaign."""
        bug = finding.same_as or finding.id
        others = [each for each in self.findings.values() if (each.same_as or each.id) == bug]
        if all(finding.case.tokens < other.case.tokens for other in others):
            for other in others:
                del self.findings[other.id]
            self.findings[finding.id] = finding

    def has_like(self, finding: Finding) -> bool:
        """Whether the store has a finding of the same backend and symptom."""
        stored = map(self._loaded, self.store.identifiers())
        key = finding.backend, finding.symptom
        return any((each.backend, each.symptom) == key for each in stored if each is not None)

    def often(self, backend: str, level: str, turn: int) -> tuple[str, ...]:
        """Symptoms that a slice need not shrink again.

        Args:
            backend: of the slice.
            level: of the slice.
            turn: the slice's number; now and then none is left out, for another bug may look the same.
        """
        if turn % LOOK_AGAIN == 0:
            return ()
        return tuple(
            symptom
            for (name, where, symptom), times in self._seen.items()
            if (name, where) == (backend, level) and times >= OFTEN
        )
