"""``report``: one HTML file about a store, and about campaigns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_fuzz.campaign.retest import place_of
from attn_fuzz.cli.arguments import DEFAULT_STORE, DeviceOption, StoreOption, UsageError, device_of
from attn_fuzz.execution.environment import environment, versions_of
from attn_fuzz.execution.process import set_up_process
from attn_fuzz.findings.entry import Entry
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.ledger import Ledger, today
from attn_fuzz.findings.signature import Signature
from attn_fuzz.findings.store import Store, StoreError, write_whole
from attn_fuzz.nights.database import Database, path_beside
from attn_fuzz.reports.from_nights import of_database
from attn_fuzz.reports.measured import Measured, of_verdicts
from attn_fuzz.reports.page import page
from attn_fuzz.reports.told import Told, from_files, run_again


def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    verdict: Annotated[
        list[Path] | None,
        typer.Option(help="What `run --json` printed, instead of what `campaign` has counted; repeat for several."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=0, help="Runs of each bug; 0: run nothing, and tell what files say.")] = 3,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write one HTML file that opens without a network: bugs with pictures, scripts and near misses, and campaigns."""
    where = None if device is None else device_of(device)
    ledger = Ledger(store)
    if store.is_dir():
        ledger.note_all()
    entries = [*ledger.entries().values()]
    measured = of_verdicts([_read(path) for path in verdict]) if verdict else _of_campaigns(store)
    set_up_process(where or "cpu")
    found, unread = _by_signature(Store(store))
    bugs = [_told(entry, found.get(entry.id), store, where, repeat) for entry in entries if entry.kind == "finding"]
    _write(output, bugs, [entry for entry in entries if entry.kind != "finding"], measured)
    typer.echo(f"{output}: {len(bugs)} bugs")
    for error in unread:
        typer.echo(f"attn-fuzz: {error}", err=True)
    raise typer.Exit(2 if unread else 0)


def _of_campaigns(store: Path) -> Measured:
    """What ``campaign`` has counted beside a store, where it ran."""
    if not path_beside(store).exists():
        return Measured()
    with Database(path_beside(store), create=False) as database:
        return of_database(database)


def _told(entry: Entry, finding: Finding | None, store: Path, device: str | None, repeat: int) -> Told:
    told = from_files(entry, finding, store)
    place = place_of(entry, device)
    return told if place is None or not repeat else run_again(told, store, place, repeat)


def _by_signature(store: Store) -> tuple[dict[str, Finding], list[StoreError]]:
    """Of the findings of each bug the one with the smallest case, and why others cannot be read."""
    found: dict[str, Finding] = {}
    unread: list[StoreError] = []
    for identifier in store.identifiers():
        try:
            finding = store.load(identifier)
        except StoreError as error:
            unread.append(error)
            continue
        before = found.setdefault(Signature.of(finding).id, finding)
        if finding.case.tokens < before.case.tokens:
            found[Signature.of(finding).id] = finding
    return found, unread


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no verdict of a campaign: {error}") from None


def _write(output: Path, bugs: Sequence[Told], known: Sequence[Entry], measured: Measured) -> None:
    seen = environment("cpu")
    made = f"Made on {today()} with {versions_of(dict(seen))}, Python {seen['python']}"
    try:
        write_whole(output, page("attn-fuzz report", made, bugs, known, measured))
    except OSError as error:
        raise UsageError(f"{output} cannot be written ({error.strerror}); choose another --output") from None
