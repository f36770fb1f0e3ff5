"""``sanitize``: a finding's script under compute-sanitizer, and what came of it kept with the finding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Final

import torch
import typer

from attn_fuzz.campaign.plan import require_available
from attn_fuzz.campaign.retest import backends_of, folder_of, keep_script, script_of
from attn_fuzz.cli.arguments import DEFAULT_STORE, JsonOption, StoreOption, UsageError, choices, device_of
from attn_fuzz.cli.store import existing
from attn_fuzz.cli.terminal import progress_console, results_console
from attn_fuzz.execution.environment import device_name, environment, versions_of
from attn_fuzz.execution.process import set_up_process
from attn_fuzz.findings import sanitized
from attn_fuzz.findings.entry import Entry
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.ledger import Ledger, today
from attn_fuzz.findings.sanitized import ERRORS, NOT_RUN, TOOLS, Sanitized, ToolVerdict
from attn_fuzz.findings.scripts.sanitizer import find_sanitizer
from attn_fuzz.findings.scripts.sanitizer import sanitize as run_under

_MISSING: Final = (
    "compute-sanitizer is not installed here; it comes with the CUDA toolkit: put the toolkit's bin on PATH, or say "
    "where the toolkit is in CUDA_HOME"
)


def sanitize(
    finding: Annotated[str, typer.Argument(metavar="FINDING", help="A finding's id, or its beginning.")],
    tool: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(TOOLS)}; repeat for several. Default: all.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="After which one tool is given up.")] = 600.0,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Run a finding's script under NVIDIA's compute-sanitizer, and keep its verdict with the finding.

    The exit status is 1 where a tool reports errors, 3 where one that was asked for came to no verdict. `show` and
    `report` tell what is kept.
    """
    tools = choices(tool, TOOLS, "tool") or TOOLS
    found = existing(store).load(finding)
    if found.device == "cpu":
        raise UsageError(f"finding {found.id} is of the CPU, and compute-sanitizer looks at what runs on a GPU")
    executable = find_sanitizer()
    if executable is None:
        raise UsageError(_MISSING)
    entry = Ledger(store).note(found)
    script = _script(entry, found, store)
    folder = folder_of(entry, store)
    verdicts = []
    for each in tools:
        progress_console.print(f"{each} ...", markup=False)
        verdicts.append(_noted(run_under(executable, each, script, seconds, folder)))
    before = sanitized.read(store, found.id) or Sanitized(finding=found.id, entry=entry.id, tools={})
    sanitized.write(store, before.with_tools(verdicts))
    if as_json:
        typer.echo(json.dumps({"finding": found.id, "tools": [dataclasses.asdict(verdict) for verdict in verdicts]}))
    else:
        console = results_console()
        for verdict in verdicts:
            console.print(str(verdict), markup=False, soft_wrap=True)
    words = {verdict.verdict for verdict in verdicts}
    raise typer.Exit(1 if ERRORS in words else 3 if NOT_RUN in words else 0)


def _script(entry: Entry, finding: Finding, store: Path) -> str:
    """The script that the ledger keeps of the bug; made, where there is none."""
    path = script_of(entry, store)
    if not path.is_file():
        device = device_of(finding.device)
        require_available(backends_of(entry, store), device)
        set_up_process(device)
        if keep_script(entry, store, device) is None:
            raise UsageError(f"there is no script of {finding.id} that could be run: `attn-fuzz script` says why")
    return path.read_text()


def _noted(verdict: ToolVerdict) -> ToolVerdict:
    """With when and where it was."""
    seen = environment("cpu")
    where = device_name("cuda") if torch.cuda.is_available() else "no GPU"
    return dataclasses.replace(verdict, on=f"{where}, {versions_of(dict(seen))}", date=today())
