"""``ledger`` and ``retest``: what has become of every bug, and which are still there."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attn_fuzz.campaign.retest import retest as run_again
from attn_fuzz.cli.arguments import DEFAULT_STORE, DeviceOption, JsonOption, StoreOption, UsageError, device_of
from attn_fuzz.cli.columns import NAME_SHARE, Column, print_fitted
from attn_fuzz.cli.terminal import results_console
from attn_fuzz.execution.environment import device_name, environment, versions_of
from attn_fuzz.execution.process import set_up_process
from attn_fuzz.findings.entry import FOUND_BY, STATES, Answer, Entry
from attn_fuzz.findings.ledger import Ledger, today
from attn_fuzz.findings.store import StoreError

IdArgument = Annotated[str | None, typer.Argument(metavar="ID", help="An entry's id, or its beginning.")]


def _opened(store: Path) -> tuple[Ledger, list[StoreError]]:
    """The ledger of a store, with all of its findings counted, and why some were not."""
    opened = Ledger(store)
    return opened, opened.note_all() if store.is_dir() else []


def _told_of(unread: Sequence[StoreError], status: int = 0) -> typer.Exit:
    """The end of a command, that says what it could not read."""
    for error in unread:
        typer.echo(f"attn-fuzz: {error}", err=True)
    return typer.Exit(2 if unread else status)


def ledger(
    entry: IdArgument = None,
    state: Annotated[str | None, typer.Option(help=f"What has become of it: {', '.join(STATES)}.")] = None,
    version: Annotated[str | None, typer.Option(help="With --state fixed: in which version.")] = None,
    same_as: Annotated[str | None, typer.Option(help="With --state duplicate: of which entry.")] = None,
    link: Annotated[str | None, typer.Option(help="Where it is reported.")] = None,
    note: Annotated[str | None, typer.Option(help="A sentence more about it.")] = None,
    found_by: Annotated[str | None, typer.Option(help=f"How it was found: {', '.join(FOUND_BY)}.")] = None,
    take: Annotated[Path | None, typer.Option(help="Merge the ledger of another store into this one.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List every bug with what has become of it; show or edit one.

    Known issues of backends, and limits that adapters declare because a backend is wrong beyond them, are entries too.
    """
    opened, unread = _opened(store)
    if take is not None:
        if not take.is_dir():
            raise UsageError(f"there is no store {take} to take a ledger from")
        opened.take(take)
    edits = {"state": state, "version": version, "same_as": same_as, "link": link, "found_by": found_by}
    changes = {name: value for name, value in edits.items() if value is not None}
    if entry is None:
        if changes or note is not None:
            raise UsageError("say which entry is to be changed: attn-fuzz ledger ID")
        _list([*opened.entries().values()], as_json=as_json)
        raise _told_of(unread)
    found = opened.entry(entry)
    if changes or note is not None:
        found = _edited(found, changes, note)
        opened.write(found)
    if as_json:
        typer.echo(json.dumps(json.loads(found.to_json())))
    else:
        _show(results_console(), found)
    raise _told_of(unread)


def _edited(entry: Entry, changes: dict[str, str], note: str | None) -> Entry:
    """An entry with what was changed; what belongs to another state goes with it."""
    if entry.kind != "finding" and {"link", "found_by"} & set(changes):
        raise UsageError(f"{entry.id} is a {entry.kind}: the project says itself where it is from")
    if "state" in changes:
        changes = {"version": "", "same_as": "", **changes}
    notes = entry.notes if note is None else (*entry.notes, f"{today()}: {note}")
    return dataclasses.replace(entry, **changes, notes=notes)  # type: ignore[arg-type]


def _latest(entry: Entry) -> str:
    """The last answer, and where it was."""
    every = [
        (answer.date, answer.answer, versions, device)
        for versions, devices in entry.matrix.items()
        for device, answer in devices.items()
    ]
    return "" if not every else f"{max(every)[1]} on {max(every)[2]}"


def _list(entries: Sequence[Entry], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"entries": [json.loads(entry.to_json()) for entry in entries]}))
        return
    console = results_console()
    columns = (
        Column("id"),
        Column("state"),
        Column("bug"),
        Column("seen", right=True, spare=True),
        Column("found by", spare=True),
        Column("now", spare=True),
    )
    rows = [
        (
            entry.id,
            entry.state_in_words,
            "\n".join(textwrap.wrap(_bug(entry), console.width // NAME_SHARE)),
            str(len(entry.seen) or ""),
            entry.found_by,
            _latest(entry),
        )
        for entry in entries
    ]
    print_fitted(console, columns, rows)


def _bug(entry: Entry) -> str:
    return str(entry.signature) if entry.kind == "finding" else f"{entry.kind} of {entry.signature.backend}"


def _show(console: Console, entry: Entry) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"{entry.id}: {entry.state_in_words}; {entry.kind}, found by: {entry.found_by}")
    line(f"  {entry.signature}")
    line(f"  {entry.about}")
    line(f"  case: {entry.case.to_json()}")
    for what in (entry.link and f"link: {entry.link}", *entry.notes, *(f"seen: {time}" for time in entry.seen)):
        if what:
            line(f"  {what}")
    for versions, devices in entry.matrix.items():
        for device, answer in devices.items():
            script = f", its script: {answer.script}" if answer.script else ""
            line(f"  {answer.answer} on {versions}, {device}, {answer.date}{script}{answer.why and f': {answer.why}'}")


def retest(
    entry: IdArgument = None,
    device: DeviceOption = None,
    scripts: Annotated[bool, typer.Option("--scripts", help="Run scripts, too; make those of what is wrong.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Run every bug of the ledger, or one, on what is installed here, and keep what came of it.

    The exit status is 1 where something is wrong, 3 where nothing was run.
    """
    where = None if device is None else device_of(device)
    opened, unread = _opened(store)
    entries = [opened.entry(entry)] if entry is not None else [*opened.entries().values()]
    set_up_process(where or "cpu")
    answers: list[tuple[Entry, Answer]] = []
    versions = versions_of(dict(environment("cpu")))
    interrupted = False
    try:
        for each, place, answer in run_again(entries, store, where, scripts=scripts):
            # That nothing ran is told, and is worth no file.
            if answer.answer != "not run":
                opened.answered(each.id, versions, device_name(place), answer)
            answers.append((each, answer))
    except KeyboardInterrupt:
        interrupted = True
    _tell(answers, versions, as_json=as_json)
    if interrupted:
        typer.echo(f"interrupted: {len(entries) - len(answers)} of {len(entries)} were not run", err=True)
        raise typer.Abort
    words = {answer.answer for _, answer in answers}
    raise _told_of(unread, 1 if "wrong" in words else 0 if words & {"right", "refused"} else 3)


def _tell(answers: Sequence[tuple[Entry, Answer]], versions: str, *, as_json: bool) -> None:
    if as_json:
        found: list[dict[str, Any]] = [
            {"id": entry.id, "state": entry.state_in_words, **dataclasses.asdict(answer)} for entry, answer in answers
        ]
        typer.echo(json.dumps({"versions": versions, "entries": found}))
        return
    columns = (Column("id"), Column("state"), Column("now"), Column("why"), Column("script", spare=True))
    rows = [(entry.id, entry.state_in_words, answer.answer, answer.why, answer.script) for entry, answer in answers]
    print_fitted(results_console(), columns, rows, versions)
    for entry, answer in answers:
        if answer.answer == "wrong" and entry.state == "fixed":
            typer.echo(f"attn-fuzz: {entry.id} was fixed in {entry.version}, and is wrong again", err=True)
        elif answer.answer == "right" and entry.state not in ("fixed", "not a bug", "duplicate"):
            typer.echo(
                f"attn-fuzz: {entry.id} is right here; if it is mended: attn-fuzz ledger {entry.id} --state fixed "
                "--version VERSION",
                err=True,
            )
