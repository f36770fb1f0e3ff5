"""How many rank cases a second: ``python -m results.render.rank_rate --ranks 2 --backend sdpa_dense --seconds 60``.

A case is what a campaign makes of it: both poisons, now and then an interfering call, the reference, all checks, a
quarter of the probes. Once all groups are warm, cases are counted by wall-clock time and by the processor time of all
processes, which other work on the machine moves less: a machine that is busy with it shows in ``load``, and in
``processors_had``, how
many this run got.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.plan import CampaignOptions, default_workers, plan
from attn_fuzz.campaign.pool import Pool
from attn_fuzz.cli.arguments import device_of


def processor_seconds(root: int, proc: Path = Path("/proc")) -> float | None:
    """User and system time of all processes below one, those that have ended included.

    Args:
        root: id of the process above them.
        proc: where the system tells of its processes.

    Returns:
        None where it does not.
    """
    parents: dict[int, int] = {}
    own: dict[int, int] = {}
    ended: dict[int, int] = {}
    for stat in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # A command's name may hold anything; what follows its last bracket is numbers (man proc_pid_stat).
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            own[pid], ended[pid] = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
    if root not in parents:
        return None
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sum(own[pid] * (pid != root) + ended[pid] for pid in below) / os.sysconf("SC_CLK_TCK")


WARM_CASES: Final = 50
"""Cases of a team before it counts: the first ones wait for imports."""

LOOK: Final = 3.0
"""Seconds between looks at the clock and the processors."""


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
    options = CampaignOptions(device=where, workers=processes, seconds=seconds, levels=("layer",), ranks=(ranks,))
    assignments = plan((backend,), options)
    seen: list[tuple[float, int, float | None]] = []

    def note(tallies: dict[str, Tally]) -> None:
        # Looking costs the processors under measurement some milliseconds.
        if seen and time.monotonic() - seen[-1][0] < LOOK:
            return
        if (cases := tallies[backend].cases) >= WARM_CASES * len(assignments):
            seen.append((time.monotonic(), cases, processor_seconds(os.getpid())))

    outcome = Pool(assignments, processes, note, lambda finding: None).run()
    tally = outcome.tallies[backend]
    if len(seen) < 2:
        raise typer.BadParameter(f"only {tally.cases} cases in that time, too few to say", param_hint="--seconds")
    (begin, first, idle), (end, last, busy) = seen[0], seen[-1]
    spent = None if idle is None or busy is None else busy - idle
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
                "processor_s_per_case": None if spent is None else round(spent / (last - first), 4),
                "processors_had": None if spent is None else round(spent / (end - begin), 2),
                "processors": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
