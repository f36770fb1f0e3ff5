"""``script``: a finding as one Python file without this project, or as a report around it."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from attn_fuzz.backends import registry
from attn_fuzz.campaign.isolated import FATAL
from attn_fuzz.campaign.plan import require_available
from attn_fuzz.campaign.replay import verdict_on
from attn_fuzz.cli.arguments import DEFAULT_STORE, DeviceOption, RootOption, StoreOption, UsageError
from attn_fuzz.cli.saved import place_of
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.process import set_up_process
from attn_fuzz.findings.regression_cases import find_regression_case
from attn_fuzz.findings.script import standalone
from attn_fuzz.findings.scripts.markdown import tracker_report
from attn_fuzz.findings.scripts.run import run_script
from attn_fuzz.findings.scripts.text import ScriptError
from attn_fuzz.oracle.examine import Verdict

_SECONDS: Final = 600.0
"""After which a script is given up; each ends its own child or ranks sooner."""


def script(
    case: Annotated[str, typer.Argument(help="A CASE.json file, a finding's id, or a case as JSON text.")],
    backend: Annotated[str | None, typer.Option(help="Backend that fails it. Default: the finding's own.")] = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    root: RootOption = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Run it, and print a report for an issue tracker around it.")
    ] = False,
) -> None:
    """Print a finding as one Python file that needs nothing of this project, to paste into a report.

    It exits with 1 while the fault is there, and with 0 once it is gone.
    """
    saved = find_regression_case(case, store).from_anywhere(root)
    where = place_of(device, saved)
    own = saved.failing.get(where.partition(":")[0], ())
    name = backend or (own[0] if own else None)
    if name is None:
        raise UsageError("the case names no backend that fails it; say --backend NAME")
    require_available((name,), where)
    set_up_process(where)
    verdict = verdict_on(saved, name, where)
    if isinstance(verdict, str):
        raise UsageError(verdict)
    title = f"{name}: {verdict.first}" if verdict.first else f"{name}: {', '.join(verdict.known) or 'no check fails'}"
    # One that fails among other calls only is accused by none of its own checks.
    sequence = saved.sequence if _among_others(verdict) else None
    fatal = type(verdict.first).__name__ in FATAL and sequence is None
    try:
        text = standalone(saved.case, registry.load(name), where, title, sequence=sequence, fatal=fatal)
    except ScriptError as error:
        raise UsageError(str(error)) from None
    if markdown:
        sentences = [str(symptom) for symptom in verdict.symptoms[:4]] or [saved.about or title]
        text = tracker_report(title, sentences, text, run_script(text, _SECONDS), environment(where))
    typer.echo(text, nl=False)


def _among_others(verdict: Verdict) -> bool:
    """Whether it is calls in a row that fail, as ``verdict_on`` has it."""
    return verdict.checks == ("batch",)
