"""``list`` and ``show``: what the store holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import DEFAULT_STORE, JsonOption, StoreOption
from attn_fuzz.cli.terminal import results_console
from attn_fuzz.findings import sanitized
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store, StoreError


def _readable(store: Store) -> tuple[list[Finding], list[StoreError]]:
    """Findings, newest first, and why the others cannot be read."""
    found: list[Finding] = []
    wrong: list[StoreError] = []
    for identifier in store.newest_first():
        try:
            found.append(store.load(identifier))
        except StoreError as error:
            wrong.append(error)
    return found, wrong


def list_(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List what was found, newest first."""
    found, wrong = _readable(existing(store))
    if as_json:
        typer.echo(json.dumps({"findings": [finding.to_dict() for finding in found]}))
    else:
        tables.print_findings_table(results_console(), found)
    for error in wrong:
        typer.echo(f"attn-fuzz: {error}", err=True)
    raise typer.Exit(2 if wrong else 0)


def show(
    finding: Annotated[str, typer.Argument(metavar="ID", help="A finding's id, or its beginning.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show one finding: what failed, the shrunk case, how it was drawn, and on which versions."""
    found = existing(store).load(finding)
    kept = sanitized.read(store, found.id)
    tools = {} if kept is None else kept.tools
    if as_json:
        more = {"sanitized": {name: dataclasses.asdict(each) for name, each in tools.items()}} if tools else {}
        typer.echo(json.dumps({**found.to_dict(), **more}))
        return
    console = results_console()
    tables.print_findings(console, [found], str(store))
    for message in found.messages[3:]:
        console.print(f"  {message}", markup=False, soft_wrap=True)
    console.print(f"  drawn as: {found.original_case.to_json()}", markup=False, soft_wrap=True)
    console.print(f"  found after {found.cases_to_find} cases, {found.seconds_to_find} s", markup=False)
    versions = ", ".join(f"{name} {value}" for name, value in found.environment.items())
    console.print(f"  {versions}", markup=False, soft_wrap=True)
    for each in tools.values():
        console.print(f"  compute-sanitizer, {each.date}: {each}", markup=False, soft_wrap=True)


def existing(folder: Path) -> Store:
    """The store in a folder.

    Raises:
        StoreError: when there is no such folder.
    """
    if not folder.is_dir():
        raise StoreError(f"there is no store {folder}; choose another with --store")
    return Store(folder)
