"""``python -m upstream [--json] [NAME ...]``: runs every report's script in a process of its own.

A script is standalone: it exits 1 while the defect is there, 0 when it is not, 3 when a package it needs is missing,
and prints what it saw in one line. Its first line says which report it stands for.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.table import Table

from attn_fuzz.cli.terminal import results_console
from attn_fuzz.execution.environment import environment

SCRIPTS: Final = Path(__file__).parent / "scripts"
SECONDS: Final = 180.0
ANSWERS: Final = {0: "not reproduced", 1: "reproduced", 3: "not tried"}


def names() -> list[str]:
    """All scripts."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py"))


def about(name: str) -> str:
    """The report that a script stands for."""
    return (ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text())) or "").splitlines()[0]


def attempt(name: str) -> dict[str, Any]:
    """One script's answer, and its last line."""
    try:
        done = subprocess.run(
            [sys.executable, SCRIPTS / f"{name}.py"], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"id": name, "about": about(name), "answer": "reproduced", "seen": f"no end after {SECONDS:.0f} s"}
    said = (done.stdout.strip() or done.stderr.strip() or "(nothing)").splitlines()[-1]
    # A traceback is a mistake of ours, as is a status that no script has; a signal is the defect.
    failed = "Traceback" in done.stderr and not done.stdout.strip()
    other = "reproduced" if done.returncode < 0 else "failed"
    answer = "failed" if failed else ANSWERS.get(done.returncode, other)
    return {"id": name, "about": about(name), "answer": answer, "seen": said[:300]}


def main(
    name: Annotated[list[str] | None, typer.Argument(help="Scripts; all by default.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Try published reports on this machine's GPU."""
    wanted = name or names()
    if unknown := sorted(set(wanted) - set(names())):
        typer.echo(f"attn-fuzz: unknown report {unknown[0]!r}; there are {', '.join(names())}", err=True)
        raise typer.Exit(2)
    if not torch.cuda.is_available():
        typer.echo("attn-fuzz: there is no CUDA device here, and every report needs one", err=True)
        raise typer.Exit(2)
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(attempt, wanted))
    if as_json:
        typer.echo(json.dumps({"environment": environment("cuda"), "reports": answers}))
        return
    table = Table()
    for column in ("report", "answer", "seen"):
        table.add_column(column)
    for answer in answers:
        table.add_row(answer["about"], answer["answer"], answer["seen"])
    results_console().print(table)


if __name__ == "__main__":
    typer.run(main)
