"""Everything that the ledger has, run again on what is installed: wrong, right, refused, or not run and why."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.campaign.isolated import FATAL, KNOWN_ISSUE, Isolated, Subject
from attn_fuzz.campaign.plan import require_available
from attn_fuzz.campaign.pool import HANG_SECONDS
from attn_fuzz.findings.entry import Answer, Entry
from attn_fuzz.findings.ledger import today
from attn_fuzz.findings.script import standalone
from attn_fuzz.findings.scripts.run import run_script
from attn_fuzz.findings.scripts.text import ScriptError
from attn_fuzz.findings.store import write_whole
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.reduction.call_sequence import CallSequence
from attn_fuzz.reference.case import CaseError

SCRIPT_SECONDS = 600.0
"""After which a script is given up; each ends its own child or ranks sooner."""


def backends_of(entry: Entry, store: Path) -> tuple[str, ...]:
    """The backends that an entry is about, by names that are found in this process."""
    named = entry.signature.backend.split(", ") if entry.kind == "known issue" else [entry.signature.backend]
    folder = (store / entry.root).resolve() if entry.root else Path.cwd()
    return tuple(registry.found_from(name, folder) for name in named)


def folder_of(entry: Entry, store: Path) -> Path | None:
    """The folder in which an entry's script runs; None for this one, as where a store has come from another machine.

    Args:
        entry: whose kernel is named from it.
        store: the folder of findings.
    """
    folder = store / entry.root
    return folder if entry.root and folder.is_dir() else None


def retested(entry: Entry, store: Path, device: str) -> Answer:
    """What comes of an entry's case here.

    It runs in a process of its own, which may die. Of a known issue that several backends have, one that is wrong is
    enough; it is right where every one that runs here is.

    Args:
        entry: what to run.
        store: the folder of findings that its backend is named from.
        device: where.
    """
    answers = [_on(entry, name, device) for name in backends_of(entry, store)]
    for answer in ("wrong", "right", "refused"):
        for found in answers:
            if found.answer == answer:
                return found
    return answers[0] if answers else Answer(answer="not run", why="no backend here has its operators", date=today())


def _on(entry: Entry, name: str, device: str) -> Answer:
    def answer(word: str, why: str = "") -> Answer:
        return Answer(answer=word, why=" ".join(why.split())[:300], date=today())

    try:
        require_available((name,), device)
        if entry.sequence is not None:
            return answer(*_among_others(entry, name, device))
        child = Isolated(Subject(name, device), HANG_SECONDS)
        try:
            report = child.report(entry.case)
        finally:
            child.close()
    except (BackendUnavailable, registry.UnknownBackend, ReferencesDisagree, CaseError) as error:
        return answer("not run", str(error))
    if report.refusal is not None:
        return answer("refused", report.refusal)
    if report.disagreement is not None:
        return answer("not run", report.disagreement)
    if report.symptom is None:
        return answer("right")
    was = entry.signature.symptom
    # What a case fails with now may be something else, of which the entry says nothing.
    other = "" if report.symptom in (was, KNOWN_ISSUE) else f"otherwise than it did ({was}): "
    return answer("wrong", f"{other}{report.message}")


def _among_others(entry: Entry, name: str, device: str) -> tuple[str, str]:
    """Of calls in a row: in this process, since none of them ended the one that found it."""
    sequence = CallSequence.from_dict(entry.sequence)
    with contextlib.redirect_stdout(sys.stderr):
        judged = sequence.judged(registry.load(name), torch.device(device))
    if sequence.index in judged.refused:
        return "refused", judged.refused[sequence.index]
    words = sequence.words(judged)
    return ("right", "") if words is None else ("wrong", words)


def script_of(entry: Entry, store: Path) -> Path:
    """Where the ledger keeps the script of an entry, if it has one."""
    return store / "ledger" / f"{entry.id}.py"


def place_of(entry: Entry, device: str | None) -> str | None:
    """Where an entry is run: where it was found, on the device that was asked for if it is of that kind, else nowhere.

    Args:
        entry: what is to run.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None for any.
    """
    if device is not None:
        return device if device.partition(":")[0] == entry.device else None
    return entry.device if entry.device == "cpu" or torch.cuda.is_available() else None


def keep_script(entry: Entry, store: Path, device: str) -> Path | None:
    """Makes the script of an entry that is wrong here, and keeps it in the ledger; None where it has none.

    A user's kernel is named in it as in the folder that it was found in, in which it is run.
    """
    folder = f"{(store / entry.root).resolve() if entry.root else Path.cwd()}/"
    (name, *_) = backends_of(entry, store)
    sequence = None if entry.sequence is None else CallSequence.from_dict(entry.sequence)
    fatal = entry.signature.symptom in FATAL and sequence is None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            backend = registry.load(name)
            text = standalone(entry.case, backend, device, entry.about, sequence=sequence, fatal=fatal)
    except ScriptError:
        return None
    path = script_of(entry, store)
    # Of what the project knows there may be no file yet.
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.replace(folder, ""))
    return path


def retest(
    entries: Sequence[Entry], store: Path, device: str | None, *, scripts: bool = False
) -> Iterator[tuple[Entry, str, Answer]]:
    """Every entry, where it ran, and what came of it, as they come.

    Args:
        entries: what to run.
        store: the folder of findings.
        device: where; None for where each was found.
        scripts: run the scripts that the ledger keeps, too, and make those of what is wrong.
    """
    for entry in entries:
        place = place_of(entry, device)
        if place is None:
            yield entry, entry.device, Answer(answer="not run", why=f"it was seen on {entry.device}", date=today())
            continue
        found = retested(entry, store, place)
        if scripts:
            found = _with_script(entry, store, place, found)
        yield entry, place, found


def _with_script(entry: Entry, store: Path, device: str, found: Answer) -> Answer:
    """An answer, with what the entry's script says, which is made where there is none and the entry is wrong."""
    path: Path | None = script_of(entry, store)
    if path is not None and not path.is_file():
        path = keep_script(entry, store, device) if found.answer == "wrong" else None
    if path is None:
        return found
    said = run_script(path.read_text(), SCRIPT_SECONDS, folder_of(entry, store))
    return dataclasses.replace(found, script=said.answer)
