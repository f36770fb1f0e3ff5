"""How many rank cases a second: ``python -m attn_fuzz.ranks.rate --ranks 2 --backend sdpa_dense --seconds 60``.

A case is what a campaign makes of it: both poisons, a decoy, the reference, all checks, a third of the probes. Printed
are cases per second of wall-clock time once all teams are warm, and processor seconds per case of the whole run, start
included, which other work on the machine moves less.
"""

from __future__ import annotations

import json
import resource
import time
from typing import Annotated, Final

import typer

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.plan import default_workers, plan
from attn_fuzz.campaign.pool import Pool
from attn_fuzz.commands.arguments import device_of


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


WARM_CASES: Final = 50
"""Cases of a team before it counts: the first ones wait for imports."""


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of every case.")] = 2,
    backend: Annotated[str, typer.Option(help="What the ranks run.")] = "sdpa_dense",
    seconds: Annotated[float, typer.Option(min=1, help="Wall-clock time.")] = 60.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Teams at a time. Default: as many as fit.")] = None,
) -> None:
    """Measures the rate of clean cases spread over ranks; prints one JSON object."""
    where = device_of(device)
    processes = workers or default_workers(where, ranks)
    assignments = plan(
        (backend,),
        where,
        workers=processes,
        seed=0,
        seconds=seconds,
        cases=None,
        levels=("layer",),
        dtypes=(),
        ranks=(ranks,),
    )
    before = _processor_seconds()
    seen: list[tuple[float, int]] = []

    def note(tallies: dict[str, Tally]) -> None:
        if (cases := tallies[backend].cases) >= WARM_CASES * len(assignments):
            seen.append((time.monotonic(), cases))

    outcome = Pool(assignments, processes, note, lambda finding: None).run()
    tally = outcome.tallies[backend]
    if len(seen) < 2:
        raise typer.BadParameter(f"only {tally.cases} cases in that time, too few to say", param_hint="--seconds")
    (begin, first), (end, last) = seen[0], seen[-1]
    typer.echo(
        json.dumps(
            {
                "ranks": ranks,
                "backend": backend,
                "device": where,
                "teams": len(assignments),
                "cases": tally.cases,
                "findings": len(outcome.findings),
                "cases_per_s": round((last - first) / (end - begin), 1),
                "processor_s_per_case": round((_processor_seconds() - before) / tally.cases, 4),
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
