"""Corruptions of case files, stores, ledgers, databases and arguments, generated from a seed.

Each is one change to a folder in which everything is right, or to words of a command that are, and a command that meets
it. ``all_of`` gives them; tests/test_corruptions.py runs them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import typer
from wrong_inputs import FINDING

from attn_fuzz.campaign.messages import Assignment, Tally
from attn_fuzz.cli.app import COMMANDS, app
from attn_fuzz.coverage.counts import Counts
from attn_fuzz.findings.ledger import Ledger
from attn_fuzz.findings.store import Store
from attn_fuzz.nights.database import Database
from attn_fuzz.nights.record import Record
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.case_format import FORMAT

CASE: Final = Case(level="kernel", lengths=(3, 2), head_dim=4)
ID: Final = FINDING.id
ENTRY: Final = "entry"
"""Stands for the id of the finding's entry in the ledger."""


class Corruption(NamedTuple):
    """Something that is wrong."""

    words: tuple[str, ...]
    """Of the command that meets it."""
    what: str
    path: str
    """Of the file that is changed; empty where the words are what is wrong."""
    spoil: Callable[[Path], None]


def make(folder: Path) -> str:
    """Fills a folder with a case, a regression case, a store, its ledger and a database, all sound; the entry's id."""
    (folder / "case.json").write_text(CASE.to_json())
    kept = folder / "tests" / "regressions" / "kept.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"format": FORMAT, "about": "", "case": CASE.to_dict()}))
    store = Store(folder / "store")
    store.prepare()
    store.save(FINDING)
    Ledger(store.folder).note_all()
    with Database(folder / "store.sqlite") as database:
        record = Record(database, 0, None, {"device": "CPU"})
        piece = record.begin(Assignment(backend="loop", device="cpu", seed=0, levels=("kernel",)))
        counts = Counts()
        counts.count([CASE] * 40, "case", [])
        counts.refuse("no such thing")
        reached = counts.take()
        assert reached is not None
        record.reach(piece, reached)
        tally = Tally(cases=40, documents=80, seconds=1.0, by_kind={"kernel fp32": 40})
        tally.worst_z, tally.worst_case = {"kernel fp32 out": 2.0}, {"kernel fp32 out": CASE.to_json()}
        record.progress(piece, tally)
        record.end()
    (entry,) = Ledger(store.folder).written()
    return entry


# Text of JSON files.


def _as(value: Any) -> Callable[[str, random.Random], bytes]:
    """A file that holds something else."""
    return lambda text, random_: value if isinstance(value, bytes) else json.dumps(value).encode()


def _cut(text: str, random_: random.Random) -> bytes:
    return text.rstrip()[: random_.randrange(len(text.rstrip()))].encode()


def _stray(text: str, random_: random.Random) -> bytes:
    """A byte that is no UTF-8, somewhere."""
    data, place = text.encode(), random_.randrange(len(text))
    return data[:place] + bytes([random_.randrange(0x80, 0xC0)]) + data[place:]


def _nul(text: str, random_: random.Random) -> bytes:
    place = random_.randrange(len(text))
    return text[:place].encode() + b"\0" * 64 + text[place + 64 :].encode()


def _unbalanced(text: str, random_: random.Random) -> bytes:
    places = [place for place, letter in enumerate(text) if letter in '{}[]":']
    place = random_.choice(places)
    return (text[:place] + text[place + 1 :]).encode()


def _twice(text: str, random_: random.Random) -> bytes:
    """As two processes leave it that write at once."""
    return text.encode() + text[random_.randrange(len(text)) :].encode()


def _with(change: Callable[[dict[str, Any], random.Random], None]) -> Callable[[str, random.Random], bytes]:
    """A file that is JSON, with one thing changed."""

    def changed(text: str, random_: random.Random) -> bytes:
        data = json.loads(text)
        change(data, random_)
        return json.dumps(data).encode()

    return changed


def _of_cases(data: dict[str, Any]) -> dict[str, Any]:
    """The case in a file, or the file's own object where it is one."""
    case: dict[str, Any] = data.get("case", data)
    return case


WRONG_IN_CASES: Final = {
    "lengths": ("many", [-1], [1.5], [[1]], {}, None, ["1"], [10**30]),
    "head_dim": (0, -4, "8", 4.5, None, [], 10**30, True),
    "heads": (0, "2", -1, {}, 2.5),
    "kv_heads": (0, "2", 3, []),
    "dtype": ("fp64", 3, None, ["fp32"], ""),
    "level": ("model", 1, None, {}),
    "memory": ("lost", 2, []),
    "causal": ("yes", 2, None, []),
    "window": ("left", [1], [1, 2, 3], 4, [None, 1]),
    "scale": ("large", [], {}),
    "seed": ("x", -1, 1.5, None, []),
    "values": ("none", 0, []),
    "cuts": ([99], "x", [-1], {}),
    "colour": (1, "red", None),
}
"""What no field of a case can be."""


def _case_field(data: dict[str, Any], random_: random.Random) -> None:
    name = random_.choice(sorted(WRONG_IN_CASES))
    _of_cases(data)[name] = random_.choice(WRONG_IN_CASES[name])


def _field(*names: str) -> Callable[[dict[str, Any], random.Random], None]:
    """A value of a kind that a field never has."""

    def change(data: dict[str, Any], random_: random.Random) -> None:
        data[random_.choice(names)] = random_.choice(([[1]], {"an": ["object"]}, [None], {"": None}))

    return change


def _newer(data: dict[str, Any], random_: random.Random) -> None:
    data["format"] = FORMAT + 1 + random_.randrange(9)


def _missing(*names: str) -> Callable[[dict[str, Any], random.Random], None]:
    return lambda data, random_: data.pop(random_.choice(names), None)


OF_TEXT: Final[dict[str, Callable[[str, random.Random], bytes]]] = {
    "cut off": _cut,
    "with a stray byte": _stray,
    "with a hole of zeros": _nul,
    "without one of its brackets": _unbalanced,
    "written twice": _twice,
    "a list": _as([1, 2]),
    "a number": _as(7),
    "null": _as(None),
    "a word": _as("case"),
    "nested too deeply": _as(b"[" * 20000),
    "NaN": _as(b"NaN"),
    "another encoding": _as(json.dumps({"lengths": [1]}).encode("utf-16")),
    "empty": _as(b""),
}

FINDINGS_FIELDS: Final = ("backend", "device", "symptom", "checks", "messages", "cases_to_find", "seconds_to_find")

FILES: Final[dict[str, tuple[dict[str, Callable[[str, random.Random], bytes]], tuple[tuple[str, ...], ...]]]] = {
    "case.json": (
        {**OF_TEXT, "with a wrong value": _with(_case_field), "of a newer format": _with(_newer)},
        (("replay", "case.json"), ("save", "case.json", "another"), ("script", "case.json")),
    ),
    "tests/regressions/kept.json": (
        {**OF_TEXT, "with a wrong value": _with(_case_field), "of a newer format": _with(_newer)},
        (("replay", "kept"),),
    ),
    f"store/{ID}.json": (
        {
            **OF_TEXT,
            "with a wrong case": _with(_case_field),
            "of a newer format": _with(_newer),
            "without something": _with(_missing("backend", "case", "symptom", "messages")),
            "with a value of a wrong kind": _with(_field(*FINDINGS_FIELDS, "environment", "symptoms", "root")),
        },
        (
            ("show", ID, "--store", "store"),
            ("list", "--store", "store"),
            ("replay", ID, "--store", "store"),
            ("script", ID, "--store", "store"),
            ("summary", "store"),
            ("ledger", "--store", "store"),
            ("report", "--repeat", "0", "--store", "store"),
        ),
    ),
    f"store/ledger/{ENTRY}.json": (
        {
            **OF_TEXT,
            "with a wrong case": _with(_case_field),
            "of a newer format": _with(_newer),
            "without something": _with(_missing("id", "signature", "case", "device")),
            "with a value of a wrong kind": _with(
                _field("signature", "state", "notes", "seen", "matrix", "about", "link")
            ),
        },
        (
            ("ledger", "--store", "store"),
            ("ledger", ENTRY, "--store", "store"),
            ("retest", ENTRY, "--store", "store"),
            ("report", "--repeat", "0", "--store", "store"),
        ),
    ),
}
"""What is done to each file, and the commands that read it."""


def _written(spoil: Callable[[str, random.Random], bytes], random_: random.Random) -> Callable[[Path], None]:
    """Writes a file anew."""
    seed = random_.getrandbits(32)
    return lambda path: path.write_bytes(spoil(path.read_text(), random.Random(seed))) and None


def of_files(random_: random.Random) -> Iterator[Corruption]:
    """For ever: files of text, one after another."""
    while True:
        for path, (spoils, commands) in FILES.items():
            for what, spoil in random_.sample(sorted(spoils.items()), 3):
                yield Corruption(random_.choice(commands), what, path, _written(spoil, random_))


# Files that are none.


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def of_places(random_: random.Random) -> Iterator[Corruption]:
    """For ever: a folder or a link where a file should be."""
    spoils = {"a folder": _folder, "a link to itself": _loop, "a link to nowhere": _nowhere}
    files = {path: commands for path, (_, commands) in FILES.items()}
    for (what, spoil), (path, commands) in itertools.cycle(itertools.product(spoils.items(), files.items())):
        yield Corruption(random_.choice(commands), what, path, spoil)


# Databases.

READERS: Final = (
    ("coverage", "--store", "store"),
    ("report", "--repeat", "0", "--store", "store"),
    ("campaign", "--backend", "loop", "--device", "cpu", "--seconds", "1", "--store", "store"),
)
_PAGE: Final = 4096


def _overwritten(random_: random.Random) -> Callable[[Path], None]:
    """A page of it is something else: the header, tables and indexes alike."""
    seed = random_.getrandbits(32)

    def spoil(path: Path) -> None:
        chance = random.Random(seed)
        data = bytearray(path.read_bytes())
        page = chance.randrange(len(data) // _PAGE) * _PAGE
        data[page : page + _PAGE] = chance.choice((chance.randbytes(_PAGE), bytes(_PAGE), b"\xff" * _PAGE))
        path.write_bytes(data)

    return spoil


def _shortened(random_: random.Random) -> Callable[[Path], None]:
    seed = random_.getrandbits(32)

    def spoil(path: Path) -> None:
        size = path.stat().st_size
        os.truncate(path, random.Random(seed).randrange(1, size - _PAGE))

    return spoil


def _sql(statement: str) -> Callable[[Path], None]:
    """A sound database whose content is none of this project's."""

    def spoil(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(statement)
        connection.commit()
        connection.close()

    return spoil


STATEMENTS: Final = (
    "PRAGMA user_version = 99",
    "PRAGMA user_version = -1",
    "PRAGMA user_version = 0",
    "DROP TABLE pairs",
    "DROP TABLE subjects",
    "DROP TABLE slices",
    "DROP TABLE axis_values",
    "ALTER TABLE slices RENAME COLUMN cases TO cages",
    "ALTER TABLE pairs RENAME COLUMN cases TO cages",
    "UPDATE pairs SET cases = 'many'",
    "UPDATE slices SET cases = 'many'",
    "UPDATE slices SET begin = 'yesterday'",
    "UPDATE pairs SET cases = x'00ff'",
    "UPDATE campaigns SET environment = '{'",
    "UPDATE campaigns SET environment = '[]'",
    "UPDATE lengths SET documents = 'many'",
)


def of_databases(random_: random.Random) -> Iterator[Corruption]:
    """For ever: databases that are damaged, cut off, of others, or that hold what none holds."""
    statements = itertools.cycle(STATEMENTS)
    while True:
        yield Corruption(random_.choice(READERS), "with a page overwritten", "store.sqlite", _overwritten(random_))
        yield Corruption(random_.choice(READERS), "cut off", "store.sqlite", _shortened(random_))
        statement = next(statements)
        yield Corruption(random_.choice(READERS), statement, "store.sqlite", _sql(statement))
        text = random_.choice((b"no database" * 400, b"\0" * 9000, b"SQLite format 3\0"))
        yield Corruption(random_.choice(READERS), "something else", "store.sqlite", _replaced(text))


def _replaced(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


# Arguments.

UNKNOWN: Final = {
    "backend": "flesh",
    "device": "tpu",
    "level": "model",
    "mode": "fast",
    "dtype": "fp8",
    "poison": "arsenic",
    "only": "M999",
    "state": "gone",
    "found_by": "luck",
    "verdict": "nowhere.json",
    "take": "nowhere",
}
"""Words that options of these names do not know."""

NEEDED: Final = {
    "check": ("kernel.py:kernel",),
    "check-layer": ("layer.py:Layer",),
    "replay": ("case.json",),
    "script": ("case.json",),
    "save": ("case.json", "another"),
    "show": (ID, "--store", "store"),
    "summary": ("store",),
    "init": ("kernel.py:kernel",),
    "retest": ("--store", "store"),
    "ledger": (ENTRY, "--store", "store"),
    "report": ("--repeat", "0", "--store", "store"),
}
"""What commands have to be given."""


def _wrong_values(option: Any) -> Iterator[str]:
    """Words that an option cannot take."""
    if option.name in UNKNOWN:
        yield UNKNOWN[option.name]
    # typer brings its own options, or has those of click, by its version.
    least = getattr(option, "min", None) or getattr(getattr(option, "type", None), "min", None)
    if least is not None:
        yield from ("many", "1,5", "", "0x10", str(least - 1), "nan" if isinstance(least, float) else "1.5")


def arguments() -> list[tuple[str, ...]]:
    """All wrong words of all commands: options that there are not, values that they do not take, words too many."""
    group = typer.main.get_command(app)
    found = []
    for name in COMMANDS:
        _, command, _ = group.resolve_command(typer.Context(group), [name])  # type: ignore[attr-defined]
        words = (name, *NEEDED.get(name, ()))
        options = [each for each in command.params if each.param_type_name == "option" and each.opts[0] != "--help"]
        found += [(*words, "--colour"), (*words, "one", "word", "more", "than", "that")]
        for option in options:
            misspelt = option.opts[0][:-1] + ("x" if option.opts[0][-1] != "x" else "y")
            found.append((*words, misspelt))
            if not option.is_flag:
                found.append((*words, option.opts[0]))
            found += [(*words, option.opts[0], value) for value in _wrong_values(option)]
    return found


def of_arguments(random_: random.Random) -> Iterator[Corruption]:
    """All of them once, in some order."""
    every = arguments()
    for words in random_.sample(every, len(every)):
        yield Corruption(words, "words", "", lambda path: None)


def all_of(seed: int, count: int) -> list[Corruption]:
    """So many, kinds in turn."""
    kinds = [
        kind(random.Random(f"{seed} {kind.__name__}")) for kind in (of_files, of_databases, of_arguments, of_places)
    ]
    # Of places there are few that differ.
    turns = itertools.cycle([0, 1, 2, 0, 1, 2, 0, 2, 0, 3])
    return list(itertools.islice((next(kinds[turn]) for turn in turns), count))


def copied(base: Path, folder: Path) -> None:
    """A sound folder of its own."""
    shutil.copytree(base, folder, symlinks=True)
