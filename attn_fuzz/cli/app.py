"""The command line. Exit status: 0 nothing found, 1 findings, 2 bad usage or an environment that cannot do it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final, cast

import typer

from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.registry import UnknownBackend
from attn_fuzz.campaign.messages import CampaignError
from attn_fuzz.cli import bench, catalogue, faults, fuzz, saved
from attn_fuzz.cli.arguments import UsageError
from attn_fuzz.evaluation.bench_processes import BenchError
from attn_fuzz.execution.heap import fill_in_children
from attn_fuzz.execution.process import interrupt_once
from attn_fuzz.findings.finding import FindingError
from attn_fuzz.findings.store import StoreError
from attn_fuzz.oracle.second_opinion import ReferencesDisagree
from attn_fuzz.reference.case import CaseError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Differential correctness tests and fuzzing for packed attention with a buffered K/V cache.",
)


_COMMANDS = (
    fuzz.run,
    fuzz.check,
    fuzz.check_layer,
    saved.replay,
    saved.script,
    saved.save,
    catalogue.backends,
    faults.faults,
    bench.bench,
)

for _command in _COMMANDS:
    # Typer makes "check-layer" of "check_layer" by itself.
    app.command()(_command)

_ONE_SENTENCE = (
    UsageError,
    CaseError,
    FindingError,
    StoreError,
    CampaignError,
    BenchError,
    BackendUnavailable,
    UnknownBackend,
    ReferencesDisagree,
)


# ClickException: typer brings its own copy of click or not, by its version.
_BAD_USAGE: Final = cast("type[Exception]", typer.BadParameter.__mro__[2])

INTERRUPTED: Final = 130
"""Exit status of a command that Ctrl-C ended before it had a result: neither clean nor a finding."""


def _usage(error: Any) -> str:
    """What is wrong with the words of a command, in one sentence."""
    context = getattr(error, "ctx", None)
    where = f"; see {context.command_path} --help" if context is not None else ""
    return error.format_message().rstrip(".") + where


def main() -> None:
    """Entry point: every expected error is one sentence on standard error and exit status 2."""
    # A scheduler's SIGTERM ends a command as Ctrl-C does: with what it has, and with its children.
    signal.signal(signal.SIGTERM, interrupt_once)
    # Read by cuBLAS when it starts; without it repeatable matrix products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Read by glibc when a process starts: of those that run cases.
    os.environ.update(fill_in_children(os.environ))
    try:
        status = app(standalone_mode=False) if sys.argv[1:] else app(["--help"], standalone_mode=False) or 2
    except _ONE_SENTENCE as error:
        typer.echo(f"attn-fuzz: {error}", err=True)
        sys.exit(2)
    except _BAD_USAGE as error:
        typer.echo(f"attn-fuzz: {_usage(error)}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    sys.exit(status or 0)
