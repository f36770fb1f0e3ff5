"""What a report tells of one bug: run again where that is asked for, and otherwise what files say."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.campaign.isolated import FATAL, Isolated, Subject
from attn_fuzz.campaign.plan import require_available
from attn_fuzz.campaign.pool import HANG_SECONDS
from attn_fuzz.campaign.retest import backends_of, retested, script_of
from attn_fuzz.findings import sanitized
from attn_fuzz.findings.entry import Entry
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.sanitized import ToolVerdict
from attn_fuzz.findings.script import standalone
from attn_fuzz.findings.scripts.text import ScriptError
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.reduction.call_sequence import CallSequence
from attn_fuzz.reference.case import Case
from attn_fuzz.reports import pictures
from attn_fuzz.reports.failing_set import failing_set
from attn_fuzz.reports.near_misses import NearMiss, answered


@dataclasses.dataclass(frozen=True)
class Told:
    """Of one bug, as the page takes it."""

    entry: Entry
    sentence: str
    original: Case | None = None
    """As it was drawn."""
    after: str = ""
    """After how much work it was found."""
    wrong: int = 0
    """Of ``times`` runs here."""
    times: int = 0
    pictures: tuple[str, ...] = ()
    script: str = ""
    trouble: str = ""
    """Why there is no picture, no script or no run."""
    near: tuple[NearMiss, ...] = ()
    sanitized: tuple[ToolVerdict, ...] = ()
    """What compute-sanitizer said of its script."""

    @property
    def shrank(self) -> list[tuple[str, Any, Any]]:
        """(what, as it was drawn, shrunk) of all that shrinking changed."""
        if self.original is None:
            return []
        names = [field.name for field in dataclasses.fields(Case)]
        sizes = [("tokens", self.original.tokens, self.entry.case.tokens)]
        rows = [(name, getattr(self.original, name), getattr(self.entry.case, name)) for name in names]
        return [(name, _brief(one), _brief(other)) for name, one, other in sizes + rows if one != other]


def _brief(value: object) -> str:
    """A value that a table has room for."""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def from_files(entry: Entry, finding: Finding | None, store: Path) -> Told:
    """Without running anything.

    Args:
        entry: of the ledger.
        finding: the one of its findings that is told.
        store: the folder of findings.

    Raises:
        StoreError: when what compute-sanitizer said cannot be read.
    """
    path = script_of(entry, store)
    script = path.read_text() if path.is_file() else ""
    tools = tuple(tool for kept in sanitized.of_entry(store, entry.id) for tool in kept.tools.values())
    told = Told(entry, entry.about, script=script, sanitized=tools)
    if finding is None:
        return told
    after = f"{finding.cases_to_find:,} cases, {finding.seconds_to_find:.1f} s"
    return dataclasses.replace(told, original=finding.original_case, after=after)


def run_again(told: Told, store: Path, device: str, times: int) -> Told:
    """With pictures, a script, near misses, and how often it fails: all of it run here, in processes that may die.

    Args:
        told: what files say.
        store: the folder of findings.
        device: where.
        times: how often its case is run.
    """
    entry = told.entry
    (name, *_) = backends_of(entry, store) or ("",)
    try:
        require_available((name,), device)
        backend = registry.load(name)
    except (BackendUnavailable, registry.UnknownBackend) as error:
        return dataclasses.replace(told, trouble=str(error))
    wrong = sum(retested(entry, store, device).answer == "wrong" for _ in range(times))
    told = dataclasses.replace(told, wrong=wrong, times=times)
    fatal = entry.signature.symptom in FATAL
    with contextlib.redirect_stdout(sys.stderr):
        told = _drawn(told, backend, device, fatal=fatal)
        if not told.script:
            told = _scripted(told, backend, device, fatal=fatal)
    if entry.sequence is not None or entry.case.all_ranks > 1:
        return told
    child = Isolated(Subject(name, device), HANG_SECONDS)
    try:
        return dataclasses.replace(told, near=tuple(answered(entry.case, _told_by(child))))
    finally:
        child.close()


def _told_by(child: Isolated) -> Callable[[Case], str]:
    def answer(case: Case) -> str:
        try:
            report = child.report(case)
        except (BackendUnavailable, ReferencesDisagree) as error:
            return f"not run: {error}"
        return f"refused: {report.refusal}" if report.refusal is not None else report.symptom or "right"

    return answer


def _drawn(told: Told, backend: registry.Backend, device: str, *, fatal: bool) -> Told:
    """With pictures of where it fails."""
    if fatal or told.entry.sequence is not None:
        return told
    try:
        failing = failing_set(told.entry.case, backend, torch.device(device))
    except Exception as error:
        return dataclasses.replace(told, trouble=f"no picture: {error}")
    if failing is None:
        return dataclasses.replace(told, trouble="no picture: no element is beyond its budget in a run by itself")
    grids = [pictures.heads_and_channels(failing, name) for name in failing.tensors]
    return dataclasses.replace(told, pictures=(pictures.where_it_fails(failing), *grids))


def _scripted(told: Told, backend: registry.Backend, device: str, *, fatal: bool) -> Told:
    entry = told.entry
    sequence = None if entry.sequence is None else CallSequence.from_dict(entry.sequence)
    try:
        text = standalone(entry.case, backend, device, entry.about, sequence=sequence, fatal=fatal)
    except ScriptError as error:
        return dataclasses.replace(told, trouble="; ".join(filter(None, (told.trouble, f"no script: {error}"))))
    return dataclasses.replace(told, script=text)
