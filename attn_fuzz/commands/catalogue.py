"""``backends``: what there is."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from attn_fuzz import show
from attn_fuzz.commands.arguments import JsonOption, UsageError
from backends import registry


def backends(
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: both.")] = None, as_json: JsonOption = False
) -> None:
    """What is available here, what each backend supports, and why the rest is not available."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; use cpu or cuda")
    places = (device,) if device else ("cpu", "cuda")
    rows = [
        (name, place, registry.load(name).kernel.why_unavailable(place))
        for name in registry.kernel_names()
        for place in places
    ]
    if not as_json:
        Console(emoji=False).print(show.backends_table(rows))
        return
    listed = []
    for name in registry.kernel_names():
        reasons = {place: reason for other, place, reason in rows if other == name}
        usable = [place for place, reason in reasons.items() if reason is None]
        capabilities = registry.load(name).kernel.capabilities
        listed.append(
            {
                "name": name,
                "available": bool(usable),
                "reason": None if usable else "; ".join(str(reason) for reason in dict.fromkeys(reasons.values())),
                "devices": usable,
                # JSON has no infinity.
                "capabilities": {
                    key: str(value) if isinstance(value, float) else value for key, value in vars(capabilities).items()
                },
            }
        )
    typer.echo(json.dumps({"backends": listed}))
