"""The findings store: a folder with one JSON file per finding, so that stores merge by copying."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from attn_fuzz.backends.registry import users
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.same import first_of
from attn_fuzz.reference.case_format import NewerVersion


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except OSError:
        return False


class StoreError(OSError):
    """The store cannot be used; the message is one sentence that says what to do."""


def write_whole(path: Path, text: str) -> None:
    """Writes a file, whole or not at all.

    Raises:
        OSError: when it cannot be written; what was there stays.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        # On a disk that has become read-only nothing can be removed either.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class Store:
    """Findings in a folder; reading needs no more than its files.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, tuple[tuple[int, ...], Finding]] = {}
        """What was read, and of which file: a night looks through its store at each finding."""

    def prepare(self) -> None:
        """Makes the folder when it is missing, and sees that it can be written to.

        Raises:
            StoreError: when it cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Permission bits do not tell about full disks and read-only mounts; a write does.
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".probe-"):
                pass
        except OSError as error:
            raise StoreError(
                f"the store {self.folder} cannot be written to ({error.strerror}); choose another with --store"
            ) from None

    def placed(self, finding: Finding) -> Finding:
        """A finding that says in which folder its backend was named: the working directory, from the store."""
        if users(finding.backend) is None:
            return finding
        return dataclasses.replace(finding, root=os.path.relpath(Path.cwd(), self.folder))

    def linked(self, finding: Finding) -> Finding:
        """A finding that says which earlier one of the store is the same bug, if one is."""
        return dataclasses.replace(finding, same_as=first_of(finding, self._readable()))

    def _readable(self) -> Iterator[Finding]:
        """Findings that can be read, the one that was written first first."""
        for identifier in reversed(self.newest_first()):
            with contextlib.suppress(StoreError):
                yield self.load(identifier)

    def root(self, finding: Finding) -> Path | None:
        """The folder that the backend of a finding of this store was named in, where it says so."""
        return (self.folder / finding.root).resolve() if finding.root else None

    def _path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}.json"

    def save(self, finding: Finding) -> Path:
        """Writes a finding, whole or not at all.

        Raises:
            StoreError: when it cannot be written; a finding of the same id that was there stays.
        """
        path = self._path(finding.id)
        try:
            write_whole(path, json.dumps(finding.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise StoreError(f"finding {finding.id} could not be written to {self.folder} ({error.strerror})") from None
        return path

    def load(self, identifier: str) -> Finding:
        """The finding of that id, or of the only id that begins so.

        Raises:
            StoreError: when there is none, or more than one, or its file is damaged or of a newer version.
        """
        path = self._path(self._completed(identifier))
        try:
            written = path.stat()
            file = written.st_ino, written.st_size, written.st_mtime_ns
            if path not in self._read or self._read[path][0] != file:
                self._read[path] = file, Finding.from_dict(json.loads(path.read_text()))
            return self._read[path][1]
        except NewerVersion as error:
            raise StoreError(f"{path}: {error}") from None
        except (ValueError, OSError, RecursionError) as error:
            # FindingError and CaseError are ValueErrors too.
            raise StoreError(f"{path} is damaged ({error}); delete it or restore it from a copy") from None

    def _completed(self, identifier: str) -> str:
        """The id that begins with what was given of it."""
        if is_file(self._path(identifier)):
            return identifier
        several = [each for each in self.identifiers() if identifier and each.startswith(identifier)]
        if not several:
            raise StoreError(f"there is no finding {identifier} in {self.folder}; it holds {self._summary()}")
        if len(several) > 1:
            raise StoreError(f"{identifier} begins the ids of {len(several)} findings: {', '.join(several[:10])}")
        return several[0]

    def identifiers(self) -> tuple[str, ...]:
        """Ids of all findings."""
        return tuple(sorted(path.stem for path in self.folder.glob("*.json")))

    def newest_first(self) -> tuple[str, ...]:
        """Ids of all findings, the one that was written last first."""

        def written(identifier: str) -> tuple[float, str]:
            try:
                return -self._path(identifier).stat().st_mtime, identifier
            except OSError:
                return 0.0, identifier

        return tuple(sorted(self.identifiers(), key=written))

    def _summary(self) -> str:
        found = self.identifiers()
        return ", ".join(found[:10]) + (" ..." if len(found) > 10 else "") if found else "none"
