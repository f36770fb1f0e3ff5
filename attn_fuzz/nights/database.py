"""One SQLite file with all that campaigns have counted: opened, made newer, or told why it cannot be used."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from attn_fuzz.nights import schema

BUSY_SECONDS: Final = 60.0
"""How long a writer waits for others, each of which takes some milliseconds every other second."""

_FULL: Final = (sqlite3.SQLITE_FULL,)
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_COMPANIONS: Final = ("", "-wal", "-shm")
"""Endings of the files that a database consists of while it is open, and after a process was killed."""


class DatabaseError(OSError):
    """A campaign database cannot be used; the message is one sentence that says what to do."""


class DamagedDatabase(DatabaseError):
    """It is no whole SQLite file."""


def path_beside(store: Path) -> Path:
    """Where the database of a findings store is."""
    folder = store.absolute()
    return folder.with_name(f"{folder.name}.sqlite")


def set_aside(path: Path) -> Path | None:
    """Gives a database another name, so that a new one can begin; its new name, or None where there is none.

    Raises:
        DatabaseError: when it cannot be renamed.
    """
    if not path.exists():
        return None
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    new = next(name for name in names if not name.exists())
    try:
        for ending in _COMPANIONS:
            part = path.with_name(path.name + ending)
            if part.exists():
                part.rename(new.with_name(new.name + ending))
    except OSError as error:
        raise DatabaseError(f"{path} could not be moved aside ({error.strerror})") from None
    return new


_KINDS: Final = {"INTEGER": "'integer', 'null'", "REAL": "'real', 'null'", "TEXT": "'text', 'null'"}
"""What SQLite says that a value of a column is, by what the column was declared to hold."""


@functools.cache
def tables(steps: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Columns of the tables that some steps of the schema make, and what they hold, by table."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for step in steps:
            connection.executescript(step)
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: {row[1]: row[2] for row in connection.execute(f"PRAGMA table_info({name})")}
            for name in names
            if not name.startswith("sqlite_")
        }


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class Database:
    """An open database; several processes may have it open at a time.

    Args:
        path: its file.
        create: make it where it is missing.

    Raises:
        DamagedDatabase: when it is damaged; nothing is changed.
        DatabaseError: when it cannot be used for another reason.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        if not create and not path.is_file():
            raise DatabaseError(f"there is no campaign database {path}; `attn-fuzz campaign` makes one")
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            with self._told():
                self._require_whole()
                self._connection.execute("PRAGMA journal_mode = WAL")
                # A process that is killed loses nothing; a machine that loses its power the last seconds at most.
                self._connection.execute("PRAGMA synchronous = NORMAL")
                self._bring_up_to_date()
                self._require_content()
        except DatabaseError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the file back."""
        self._connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_whole(self) -> None:
        (said,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            raise self._damaged()

    def _require_content(self) -> None:
        """Every table has its columns, and those what they are to hold: SQLite itself takes any value anywhere."""
        for table, kinds in tables(tuple(schema.STEPS)).items():
            found = {row[1]: row[2] for row in self._connection.execute(f"PRAGMA table_info({table})")}
            if found != kinds:
                raise self._damaged()
            odd = " OR ".join(f"typeof({column}) NOT IN ({_KINDS[kind]})" for column, kind in kinds.items())
            if self._connection.execute(f"SELECT 1 FROM {table} WHERE {odd} LIMIT 1").fetchone():
                raise self._damaged()
        for (text,) in self._connection.execute("SELECT environment FROM campaigns"):
            if not _is_object(text):
                raise self._damaged()

    def _damaged(self) -> DamagedDatabase:
        return DamagedDatabase(
            f"{self.path} is damaged; restore it from a copy, or start a new one with --set-aside, which keeps the "
            f"old file under another name (findings are not in it)"
        )

    def _bring_up_to_date(self) -> None:
        """Takes an older version to today's, step by step, all or nothing."""
        newest = len(schema.STEPS)
        if self._version() == newest:
            return
        with self.writing():
            # Under the lock, for another process may be doing it.
            self._require_ours(newest)
            for step in schema.STEPS[self._version() :]:
                for statement in step.split(";"):
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {newest}")

    def _version(self) -> int:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        return int(version)

    def _require_ours(self, newest: int) -> None:
        version = self._version()
        if not 0 <= version <= newest:
            raise DatabaseError(
                f"{self.path} was written by a newer version (schema {version}, this one has {newest}); upgrade "
                f"attn-fuzz, or choose another store with --store"
            )
        (tables,) = self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if version == 0 and tables:
            raise DatabaseError(f"{self.path} is no campaign database; choose another store with --store")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Says what SQLite has to say in a sentence."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _DAMAGED:
                raise self._damaged() from None
            if code in _FULL:
                raise DatabaseError(f"the disk is full: {self.path} could not be written; make room on it") from None
            raise DatabaseError(f"{self.path} cannot be used ({error}); choose another store with --store") from None
        except OSError as error:
            if isinstance(error, DatabaseError):
                raise
            raise DatabaseError(
                f"{self.path} cannot be used ({error.strerror}); choose another store with --store"
            ) from None

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, which other writers wait for: all of it, or nothing.

        Raises:
            DatabaseError: when it cannot be written.
        """
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # After some errors, a full disk among them, SQLite has taken it back by itself.
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def copied(self) -> bytes:
        """All of it as it is now, as the content of a file.

        Raises:
            DatabaseError: when it cannot be read.
        """
        with self._told():
            return self._connection.serialize()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What a query finds.

        Raises:
            DatabaseError: when it cannot be read.
        """
        with self._told():
            return self._connection.execute(query, values).fetchall()
