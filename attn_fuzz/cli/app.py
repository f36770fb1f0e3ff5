"""The command line. Exit status: 0 nothing found, 1 findings, 2 bad usage or trouble, 3 nothing or too little tested.

A command is imported when it is called, since torch takes seconds: help and usage errors of the whole answer at once.
"""

from __future__ import annotations

import builtins
import importlib
import os
import signal
import sys
from typing import Annotated, Any, Final, cast

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS: Final = {
    "run": ("fuzz", "Fuzz backends with the full buffered-K/V layer and at kernel level."),
    "check": ("fuzz", "Fuzz your own kernel, by itself and inside the buffered layer."),
    "check-layer": ("fuzz", "Fuzz your own attention layer (docs/your_layer.md)."),
    "init": ("init", "Write tests, a workflow and an ignore entry for your kernel into your repository."),
    "campaign": ("night", "Fuzz all backends in all modes until told to end, and go on where the last one was."),
    "coverage": ("coverage", "What campaigns have reached, and what they never have."),
    "replay": ("saved", "Run one saved case and show every check's verdict."),
    "script": ("script", "Print a finding as one Python file that needs nothing of this project."),
    "save": ("saved", "Keep a failing case as a regression case, which the test suite collects."),
    "list": ("store", "List what was found, newest first."),
    "show": ("store", "Show one finding: what failed, the shrunk case, and on which versions."),
    "ledger": ("ledger", "List every bug with what has become of it; show or edit one."),
    "retest": ("ledger", "Run every bug of the ledger on what is installed here."),
    "sanitize": ("sanitize", "Run a finding's script under compute-sanitizer, and keep its verdict."),
    "report": ("report", "Write one HTML file about bugs and campaigns, with pictures."),
    "summary": ("summary", "Print a verdict, or a store, as Markdown for a comment."),
    "schema": ("summary", "Print the JSON schema of a verdict."),
    "backends": ("catalogue", "What is available here, what each backend supports, and why the rest is not."),
    "faults": ("faults", "Hunt every seeded fault on the CPU, without hints."),
    "bench": ("bench", "Documents and cases per second of all modes, beside the bare kernels."),
}
"""By name: the module of ``attn_fuzz.cli`` that has it, and what it does."""


_CAMPAIGNS: Final = ("run", "check", "check-layer")
"""Commands that start processes as soon as they can."""


def function_of(module: Any, name: str) -> Any:
    """What a command does, by its name; ``list_`` where Python has the name already."""
    word = name.replace("-", "_")
    return getattr(module, f"{word}_" if hasattr(builtins, word) else word)


def _loaded(name: str) -> Any:
    """A command with its options."""
    module = importlib.import_module(f"attn_fuzz.cli.{COMMANDS[name][0]}")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(function_of(module, name))
    return typer.main.get_command(single)


class _Group(TyperGroup):
    """Commands by name, each without its options until it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _loaded(cast("str", name)), rest


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Differential correctness tests and fuzzing for packed attention with a buffered K/V cache.",
)


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        from attn_fuzz import __version__

        typer.echo(f"attn-fuzz {__version__}, torch {version('torch')}, Python {sys.version.partition(' ')[0]}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Options of all commands: there are none but those that end at once."""


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose message is all that is to be said of them."""
    from attn_fuzz.backends.kernel import BackendUnavailable
    from attn_fuzz.backends.registry import UnknownBackend
    from attn_fuzz.campaign.messages import CampaignError
    from attn_fuzz.cli.arguments import UsageError
    from attn_fuzz.evaluation.bench_processes import BenchError
    from attn_fuzz.findings.entry import LedgerError
    from attn_fuzz.findings.finding import FindingError
    from attn_fuzz.findings.store import StoreError
    from attn_fuzz.nights.database import DatabaseError
    from attn_fuzz.nights.machines import ClusterError
    from attn_fuzz.oracle.second_opinion import ReferencesDisagree
    from attn_fuzz.reference.case import CaseError

    return (
        UsageError,
        CaseError,
        FindingError,
        StoreError,
        LedgerError,
        DatabaseError,
        ClusterError,
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
    from attn_fuzz.execution.signals import interrupt_once

    # A scheduler's SIGTERM ends a command as Ctrl-C does: with what it has, and with its children.
    signal.signal(signal.SIGTERM, interrupt_once)
    # Read by cuBLAS when it starts; without it repeatable matrix products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if sys.argv[1:2] and sys.argv[1] in _CAMPAIGNS and "--help" not in sys.argv:
        from attn_fuzz.campaign.new_process import prepare

        # Which imports torch, as this process does: side by side.
        prepare()
    try:
        status = app(standalone_mode=False) if sys.argv[1:] else app(["--help"], standalone_mode=False) or 2
    except _BAD_USAGE as error:
        typer.echo(f"attn-fuzz: {_usage(error)}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        typer.echo(f"attn-fuzz: {error}", err=True)
        sys.exit(2)
    sys.exit(status or 0)
