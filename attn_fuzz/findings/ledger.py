"""The ledger: one JSON file per bug, in a folder of the store; what is known of backends is in it without any file.

Files merge by copying where each store has bugs of its own; ``Ledger.take`` merges those that both have.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attn_fuzz.backends import known, limits
from attn_fuzz.backends.known import KnownIssue
from attn_fuzz.backends.limits import DeclaredLimit
from attn_fuzz.findings.entry import Answer, Entry, LedgerError, merged
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.signature import Signature
from attn_fuzz.findings.store import Store, StoreError, is_file, write_whole
from attn_fuzz.oracle.known_issues import EFFECTS
from attn_fuzz.reference.case_format import NewerVersion

FOLDER: Final = "ledger"
"""Of a store."""


def today() -> str:
    """The date, as the ledger has it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def sighting(finding: Finding) -> str:
    """A time that a bug was found, in words: the same words are the same time."""
    where = f"on {finding.environment.get('device', finding.device)}"
    when = finding.environment.get("date", "no date")
    return f"{when} {where}: {finding.id} after {finding.cases_to_find} cases and {finding.seconds_to_find} s"


def entry_of(finding: Finding) -> Entry:
    """The entry of a bug that is seen for the first time."""
    signature = Signature.of(finding)
    return Entry(
        id=signature.id,
        signature=signature,
        device=finding.device.partition(":")[0],
        case=finding.case,
        sequence=finding.sequence,
        root=finding.root,
        about=finding.messages[0] if finding.messages else "",
        state="reduced" if finding.case != finding.original_case else "new",
        seen=(sighting(finding),),
    )


def _with_script(reference: str, script: str) -> str:
    return f"{reference}; script: upstream/scripts/{script}" if script else reference


def _of_known(issue: KnownIssue) -> Entry:
    """A known issue as an entry; it says itself what it is about."""
    effect = EFFECTS.get(issue.id)
    tensors = sorted(effect.tensors) if effect is not None else []
    signature = Signature(
        backend=", ".join(issue.backends) or ", ".join(issue.operators[:1]),
        symptom="Crashed" if issue.crashes else "known",
        tensor=", ".join(tensors),
        failing=(),
        axes=(),
    )
    return Entry(
        id=issue.id,
        signature=signature,
        device=issue.device,
        case=issue.minimal,
        about=issue.about,
        kind="known issue",
        state="reported" if "#" in issue.reference.partition(";")[0] else "reduced",
        found_by=issue.found_by,
        link=_with_script(issue.reference, issue.script),
    )


def _of_limit(limit: DeclaredLimit) -> Entry:
    """A limit that an adapter declares because its backend is wrong or dies beyond it, as an entry."""
    signature = Signature(backend=limit.backend, symptom=limit.symptom, tensor="", failing=(), axes=())
    return Entry(
        id=limit.id,
        signature=signature,
        device=limit.device,
        case=limit.minimal,
        about=limit.about,
        kind="declared limit",
        state="reduced",
        found_by=limit.found_by,
        link=_with_script(limit.reference, limit.script),
    )


class Ledger:
    """The entries of a store, and those of what is known.

    Args:
        store: the folder of findings; the ledger is a folder in it.
    """

    def __init__(self, store: Path) -> None:
        self.store, self.folder = store, store / FOLDER

    def _path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}.json"

    def written(self) -> dict[str, Entry]:
        """Entries that have a file, by id.

        Raises:
            LedgerError: when one cannot be read.
        """
        return {path.stem: self._read(path) for path in sorted(self.folder.glob("*.json"))}

    def _read(self, path: Path) -> Entry:
        try:
            return Entry.from_json(path.read_text())
        except NewerVersion as error:
            raise LedgerError(f"{path}: {error}") from None
        except (LedgerError, OSError, UnicodeDecodeError, RecursionError) as error:
            raise LedgerError(f"{path} is damaged ({error}); delete it or restore it from a copy") from None

    def entries(self) -> dict[str, Entry]:
        """All of them by id: known issues and declared limits first, then those of this store."""
        written = self.written()
        told = [*map(_of_known, known.KNOWN), *map(_of_limit, limits.LIMITS)]
        # Of what the project knows a store has what came of it here, and what people wrote; the rest is in one place.
        found = {each.id: _as_told(each, written.get(each.id)) for each in told}
        return found | {name: entry for name, entry in written.items() if name not in found}

    def entry(self, beginning: str) -> Entry:
        """The entry of that id, or of the only id that begins so.

        Raises:
            LedgerError: when there is none, or more than one.
        """
        every = self.entries()
        several = [beginning] if beginning in every else [each for each in every if each.startswith(beginning)]
        if not several:
            raise LedgerError(f"there is no entry {beginning} in the ledger of {self.store}")
        if len(several) > 1:
            raise LedgerError(f"{beginning} begins the ids of {len(several)} entries: {', '.join(several[:10])}")
        return every[several[0]]

    def write(self, entry: Entry) -> Path:
        """Writes an entry, whole or not at all.

        Raises:
            StoreError: when it cannot be written.
        """
        path = self._path(entry.id)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, entry.to_json())
        except OSError as error:
            raise StoreError(f"the ledger's {path} could not be written ({error.strerror})") from None
        return path

    def note(self, finding: Finding, instead_of: Finding | None = None) -> Entry:
        """Counts a finding, in a new entry or in that of the same signature.

        Args:
            finding: as the store has it.
            instead_of: a larger one of the same campaign, which is counted no more.

        Raises:
            StoreError: when its entry cannot be read or written.
        """
        entry = entry_of(finding)
        path = self._path(entry.id)
        # A link that leads nowhere is something that people made, too.
        if is_file(path) or path.is_symlink():
            try:
                before = self._read(path)
            except LedgerError as error:
                raise StoreError(str(error)) from None
            gone = {sighting(instead_of)} if instead_of is not None else set()
            seen = tuple(sorted({*before.seen, *entry.seen} - (gone - set(entry.seen))))
            if seen == before.seen:
                return before
            entry = dataclasses.replace(before, seen=seen)
        self.write(entry)
        return entry

    def note_all(self) -> list[StoreError]:
        """Counts the findings of the store that are not yet in the ledger, as those of an older version are not.

        Returns:
            Why some could not be read.

        Raises:
            StoreError: when an entry cannot be read or written.
        """
        store, unread = Store(self.store), []
        for identifier in reversed(store.newest_first()):
            try:
                finding = store.load(identifier)
            except StoreError as error:
                unread.append(error)
                continue
            # A larger form of another finding is no bug of its own.
            if not finding.same_as:
                self.note(finding)
        return unread

    def answered(self, identifier: str, versions: str, device: str, answer: Answer) -> Entry:
        """An entry with one more answer, written."""
        entry = self.entry(identifier)
        matrix = {**entry.matrix, versions: {**entry.matrix.get(versions, {}), device: answer}}
        entry = dataclasses.replace(entry, matrix=matrix)
        self.write(entry)
        return entry

    def take(self, other: Path) -> int:
        """Merges the ledger of another store into this one, and says how many entries that had.

        Raises:
            LedgerError: when one cannot be read.
            StoreError: when one cannot be written.
        """
        theirs, mine = Ledger(other).written(), self.written()
        for name, entry in theirs.items():
            self.write(merged(mine[name], entry) if name in mine else entry)
        return len(theirs)


def _as_told(told: Entry, written: Entry | None) -> Entry:
    """What the project says of something known, with what a store has of it."""
    if written is None:
        return told
    theirs: Mapping[str, object] = {name: getattr(written, name) for name in ("notes", "matrix", "seen")}
    edited = {name: getattr(written, name) for name in ("state", "version", "same_as")}
    return dataclasses.replace(told, **theirs, **edited)  # type: ignore[arg-type]
