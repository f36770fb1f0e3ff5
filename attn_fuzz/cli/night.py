"""``campaign``: goes on until it is told to end, and where the last one was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.plan import available_backends, default_workers, devices_in_turn, require_available
from attn_fuzz.campaign.pool import Outcome
from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import (
    DEFAULT_STORE,
    BackendOption,
    JsonOption,
    LevelOption,
    ModeOption,
    SeedOption,
    StoreOption,
    UsageError,
    WorkersOption,
    choices,
    device_of,
    modes_of,
)
from attn_fuzz.cli.campaigns import UNTESTED, VERDICTS, campaign_dict
from attn_fuzz.cli.night_machines import Covered, cluster_wishes
from attn_fuzz.cli.night_screen import NightScreen
from attn_fuzz.cli.terminal import progress_console, results_console
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.findings.store import Store
from attn_fuzz.nights import holes
from attn_fuzz.nights.cluster import Cluster
from attn_fuzz.nights.database import DamagedDatabase, Database, DatabaseError, path_beside, set_aside
from attn_fuzz.nights.deaths import Deaths
from attn_fuzz.nights.kept import Kept
from attn_fuzz.nights.leftovers import NotesFolder, recover
from attn_fuzz.nights.machines import ClusterWishes
from attn_fuzz.nights.ray_machines import RayMachines
from attn_fuzz.nights.record import Record
from attn_fuzz.nights.spaces import default_devices, targets
from attn_fuzz.nights.supervisor import Supervisor, Wishes
from attn_fuzz.nights.view import View
from attn_fuzz.reference.case import LEVELS

Share = Callable[[tuple[str, str]], float]
"""Of values and pairs, what a backend has reached on a kind of device, from 0 to 1."""

SetAsideOption = Annotated[
    bool, typer.Option("--set-aside", help="Give a damaged database another name, and begin a new one.")
]


def campaign(
    backend: BackendOption = None,
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Wall-clock time. Default: until Ctrl-C or SIGTERM.")
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[
        list[str] | None,
        typer.Option(help="cpu, cuda (all GPUs) or cuda:N; repeat for several. Default: all GPUs, and the CPU."),
    ] = None,
    level: LevelOption = None,
    mode: ModeOption = "all",
    workers: WorkersOption = None,
    store: StoreOption = DEFAULT_STORE,
    aside: SetAsideOption = False,
    new_only: Annotated[
        bool, typer.Option("--new-only", help="Exit with 1 only for bugs that the ledger did not have.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster whose machines run it, `auto` for the one of this machine."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fuzz all backends in all modes, until told to end; what is behind comes first (docs/nights.md).

    Started again with the same store it goes on where it was: counts, coverage and findings are kept.
    """
    if seconds is not None and math.isnan(seconds):
        raise UsageError("--seconds must be a number")
    if ray is not None:
        asked = cluster_wishes(device, backend, choices(level, LEVELS, "level"), mode, workers, seed, seconds)
        nothing = Wishes((), 0, seed, seconds)
        night = _Night(nothing, Store(store), as_json, named=tuple(backend or ()), new_only=new_only)
        raise typer.Exit(night.run_on(ray, asked, set_old_aside=aside))
    devices = _devices(device)
    levels = choices(level, LEVELS, "level") or LEVELS
    names = _backends(backend, devices)
    found = targets(names, devices, levels, modes_of(mode))
    if untestable := [name for name in names if backend and name not in {target.backend for target in found}]:
        raise UsageError(f"{untestable[0]} has no such level, or takes no batches; choose another --level or --mode")
    count = workers or max(default_workers(each) for each in devices)
    wishes = Wishes(tuple(found), count, seed, seconds)
    night = _Night(wishes, Store(store), as_json, named=tuple(backend or ()), new_only=new_only)
    raise typer.Exit(night.run(set_old_aside=aside))


def _devices(given: Sequence[str] | None) -> tuple[str, ...]:
    """Each GPU by its number, and the CPU."""
    if not given:
        return default_devices()
    return tuple(dict.fromkeys(each for name in given for each in devices_in_turn(device_of(name))))


def _backends(given: Sequence[str] | None, devices: Sequence[str]) -> tuple[str, ...]:
    """Those that were asked for, or all that run on one of the devices.

    Raises:
        BackendUnavailable: for one that was asked for and runs on none.
    """
    kinds = tuple(dict.fromkeys(device.partition(":")[0] for device in devices))
    if not given:
        return tuple(dict.fromkeys(name for kind in kinds for name in available_backends(kind)))
    names = tuple(dict.fromkeys(given))
    for name in names:
        if not any(targets([name], [device], LEVELS, ("case",)) for device in devices):
            require_available([name], devices[0])
    return names


@dataclasses.dataclass
class _Night:
    """One start of the command."""

    wishes: Wishes
    store: Store
    as_json: bool
    named: tuple[str, ...]
    new_only: bool

    def _database(self, *, set_old_aside: bool) -> Path:
        """Where it is; its store is there."""
        self.store.prepare()
        path = path_beside(self.store.folder)
        if set_old_aside and (kept_as := _damaged(path)) is not None:
            progress_console.print(f"the damaged database is kept as {kept_as}", markup=False, soft_wrap=True)
        return path

    @property
    def device(self) -> str:
        """That the first target is tested on; where other machines have the targets, this one's CPU."""
        return self.wishes.targets[0].device if self.wishes.targets else "cpu"

    def run_on(self, address: str, asked: ClusterWishes, *, set_old_aside: bool) -> int:
        """The same on the machines of a Ray cluster."""
        path, kept = self._database(set_old_aside=set_old_aside), Kept(self.store)
        with Database(path) as database:
            covered = Covered(database)
            # Ray tells of lost machines on standard output.
            with (
                contextlib.redirect_stdout(sys.stderr),
                contextlib.closing(RayMachines(address, asked.kinds)) as machines,
                NightScreen(covered.share) as screen,
            ):
                cluster = Cluster(asked, machines, database, kept, screen.show)
                interrupted = cluster.run()
            return self._told(cluster.view, kept, covered.share, interrupted=interrupted)

    def run(self, *, set_old_aside: bool) -> int:
        """From the first look at the store to the exit status."""
        path = self._database(set_old_aside=set_old_aside)
        versions = environment(self.device)
        kept = Kept(self.store)
        with Database(path) as database:
            record = Record(database, self.wishes.seed, self.wishes.seconds, versions)
            beside = self.store.folder.absolute().with_name(f"{self.store.folder.name}.running")
            notes = NotesFolder(beside)
            compiled = [target.backend for target in self.wishes.targets if target.compiled]
            deaths = Deaths(notes.path, compiled, [(each.backend, each.symptom) for each in kept.fatal()])
            left = self._recovered(beside, record, kept, deaths)
            if left:
                words = "an earlier campaign was killed" if left == 1 else f"{left} earlier campaigns were killed"
                progress_console.print(f"{words}: nothing that was found is lost", soft_wrap=True)

            def share(subject: tuple[str, str]) -> float:
                return holes.share(record.pairs(subject), *subject)

            with NightScreen(share) as screen:
                supervisor = Supervisor(self.wishes, record, kept, notes, deaths, screen.show)
                interrupted = supervisor.run()
            # What was not looked into is left to the next campaign.
            if not kept.troubles and not deaths.pending:
                notes.close()
            _end(record, supervisor.view)
            return self._told(supervisor.view, kept, share, interrupted=interrupted)

    def _recovered(self, beside: Path, record: Record, kept: Kept, deaths: Deaths) -> int:
        """Keeps what campaigns that were killed had found, and looks into the rest; how many there were."""

        def keep(finding: Any) -> None:
            kept.keep(finding)
            record.find(finding, None)

        return recover(beside, keep, kept.has_like, deaths.add)

    def _told(self, view: View, kept: Kept, share: Share, *, interrupted: bool) -> int:
        """Prints what came of it; the exit status."""
        tallies: dict[str, Tally] = {}
        for (backend, _), tally in view.tallies().items():
            tallies.setdefault(backend, Tally()).add(tally)
        findings = list(kept.findings.values())
        troubles = (*kept.troubles, *view.troubles)
        early = interrupted and self.wishes.seconds is not None
        outcome = Outcome(tallies, findings, time.monotonic() - view.begun, interrupted, troubles)
        untested = self._untested(outcome, early=early)
        telling = kept.new(findings) if self.new_only else findings
        status = 2 if troubles else 1 if telling else UNTESTED if untested else 0
        if self.as_json:
            data = campaign_dict(outcome, self.device, self.wishes.seed, POISONS)
            shares = {name: round(_share(view, share, name), 4) for name in tallies}
            more = {"untested": untested, "limits": [], "coverage": shares, "remarks": view.remarks}
            verdict = VERDICTS[1 if findings and status == 0 else status]
            typer.echo(json.dumps({"verdict": verdict, **data, **more}))
        else:
            console = results_console()
            tables.print_campaign(console, outcome)
            tables.print_findings(console, findings, str(self.store.folder))
            for remark in view.remarks:
                console.print(remark, markup=False, soft_wrap=True)
            console.print(f"seed {self.wishes.seed}; `attn-fuzz coverage` says what was never reached", markup=False)
        for sentence in (*troubles, *untested):
            typer.echo(f"attn-fuzz: {sentence}", err=True)
        return status

    def _untested(self, outcome: Outcome, *, early: bool) -> list[str]:
        """Why a campaign without findings is no pass."""
        cases = {name: tally.cases for name, tally in outcome.tallies.items()}
        said = [f"{name} was not tested" for name in self.named if not cases.get(name)]
        if not self.named and not any(cases.values()):
            said.append("nothing was tested")
        if early:
            said.append(f"interrupted after {sum(cases.values())} cases, before its time was over")
        return said


def _share(view: View, share: Share, backend: str) -> float:
    """The least share of values and pairs that a backend has reached on any kind of device, from 0 to 1."""
    return min(share(subject) for subject in view.tallies() if subject[0] == backend)


def _damaged(path: Path) -> Path | None:
    """Moves a database aside that is damaged, and no other; its new name."""
    if not path.exists():
        return None
    try:
        Database(path).close()
    except DamagedDatabase:
        return set_aside(path)
    return None


def _end(record: Record, view: View) -> None:
    """Writes what is left to write."""
    try:
        record.end()
    except DatabaseError as error:
        view.trouble(str(error))
