"""``summary`` and ``schema``: a verdict for a comment or the summary of a CI job, and what one looks like as JSON."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_fuzz.cli.arguments import UsageError
from attn_fuzz.findings.store import Store
from attn_fuzz.findings.summary import markdown


def _read(path: Path) -> dict[str, Any]:
    """The verdict of a file, or the findings of a store.

    Raises:
        UsageError: where there is neither.
        StoreError: when a finding cannot be read.
    """
    if path.is_dir():
        store = Store(path)
        return {"findings": [store.load(identifier).to_dict() for identifier in store.newest_first()]}
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("findings"), list):
        raise UsageError(f"{path} is no verdict; give what `check --json` printed, or a folder of findings")
    return data


def summary(
    verdict: Annotated[Path, typer.Argument(help="A file with what --json printed, or a folder of findings.")],
) -> None:
    """Print a verdict as Markdown: one line, the findings, the smallest case and its replay, versions."""
    typer.echo(markdown(_read(verdict)), nl=False)


def schema() -> None:
    """Print the JSON schema of what ``run``, ``check`` and ``check-layer`` print with ``--json``."""
    typer.echo(importlib.resources.files("attn_fuzz").joinpath("verdict.schema.json").read_text(), nl=False)
